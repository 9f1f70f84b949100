"""The search: stages, what drives them, and candidates to losses through the ledger."""
