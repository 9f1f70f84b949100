"""How texts of different length lie in one matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bbprompt.backends.layout import pack

LENGTHS = (5, 40, 9, 23, 24, 5, 1, 38)


@pytest.mark.parametrize("fast", [None, torch.float32, torch.bfloat16])
def test_rows_groups_and_grids(fast: Any) -> None:
    layout = pack(LENGTHS, slack=16, fast=fast)
    assert [LENGTHS[i] for i in layout.order] == sorted(LENGTHS)
    covered = sorted(
        row for at, size in zip(layout.starts.tolist(), LENGTHS, strict=True) for row in range(at, at + size)
    )
    assert covered == list(range(sum(LENGTHS)))
    first = 0
    for group in layout.groups:
        sizes = [LENGTHS[i] for i in group.texts.tolist()]
        assert max(sizes) - min(sizes) < 16
        assert layout.starts[group.texts].min().item() == first
        assert group.mask.sum().item() == len(group.cells) == sum(sizes)
        # The grid's cells give back the rows in order.
        assert group.rows[:, : group.width].flatten()[group.cells].tolist() == list(range(sum(sizes)))
        columns = group.rows.shape[1]
        assert group.rows.shape == group.mask[:, 0, 0].shape
        assert group.even == (set(sizes) == {columns})
        assert max(sizes) <= group.width <= columns
        wanted = {None: 1, torch.float32: 16 if len(set(sizes)) > 1 else 1, torch.bfloat16: 16}[fast]
        assert columns % wanted == 0
        # In bfloat16 torch's kernel for 33 to 63 tokens does not scale with threads.
        assert group.width == (64 if fast is torch.bfloat16 and max(sizes) > 32 else max(sizes))
        first += sum(sizes)
    assert first == sum(LENGTHS)
    assert [len(group.texts) for group in layout.groups] == [4, 3, 1]
