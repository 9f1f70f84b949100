"""The model card of a trained language model head."""

from __future__ import annotations

from bbprompt.backends.trained_head import HeadCard

__all__ = ["head_card"]


def head_card(card: HeadCard) -> str:
    """Markdown: what it is, what it was trained on under which terms, and how well it guesses."""
    recipe = card.training["recipe"]
    held: dict[str, dict[str, float]] = card.training["held_out"]
    total = sum(each["tokens"] for each in held.values())
    names = next(iter(held.values()))
    whole = {name: sum(each[name] * each["tokens"] for each in held.values()) / total for name in names}
    rows = {**held, "all": whole | {"tokens": total}}
    pieces = recipe["files_per_step"] * recipe["per_file"]
    return "\n".join(
        [
            "---",
            "license: cc-by-nc-4.0",
            f"base_model: {card.backbone}",
            "library_name: bbprompt",
            "---",
            "",
            f"# Language model head for {card.backbone}",
            "",
            f"A transform layer (dense layer of width {card.width}, GELU, LayerNorm, and back to {card.hidden}),",
            f"a bias for each of {card.tokens:,} tokens, and their ids. A token is scored by the product with its",
            "row of the backbone's own input embedding, which is not in here. The backbone was frozen. The head makes",
            "it a masked language model for methods that read labels as words; it is no good at writing text.",
            "",
            f"**Licence: {card.license}.** The texts it was trained on are listed below.",
            "",
            f"Backbone weights (SHA-256): `{card.backbone_digest}`. Training: {recipe['steps']} steps of {pieces}",
            f"pieces of at most {recipe['max_tokens']} tokens, {recipe['masked']:.0%} of them to guess (80 %",
            f"masked, 10 % replaced, 10 % left), seed {recipe['seed']}; the whole recipe stands in `config.json`.",
            "",
            *([recipe["note"], ""] if recipe.get("note") else []),
            "## Masked tokens of held-out documents",
            "",
            "Share guessed right, and share where the right token is among the five likeliest; beside it what always",
            "guessing the most frequent tokens gives. A token that the head cannot name counts as wrong.",
            "",
            "| text | tokens | can be named | top-1 | top-5 | unigram top-1 | unigram top-5 | loss (nats) |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {name} | {each['tokens']:.0f} | {each['known']:.3f} | {each['top1']:.3f} | {each['top5']:.3f} | "
                f"{each['unigram1']:.3f} | {each['unigram5']:.3f} | {each['loss']:.3f} |"
                for name, each in rows.items()
            ),
            "",
            "## Texts and their terms, as stated there",
            "",
            *(f"- {source}" for source in card.sources),
            "",
        ]
    )
