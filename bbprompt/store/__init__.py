"""A run on disk: its directory, the journal of its calls and the ledger of its budget."""
