# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values of self-attention in one product, whatever happens to the weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golden_inputs import relative_error
from ssldiff_fast.models.attention import CrossAttention

TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def random_attention(heads: int = 2, head_width: int = 16) -> CrossAttention:
    return CrossAttention(24, heads=heads, head_width=head_width)


def published(attn: CrossAttention, x: Tensor) -> Tensor:
    parts = (attn.split_heads(to(x)) for to in (attn.to_q, attn.to_k, attn.to_v))
    out: Tensor = attn.to_out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    return out


@torch.no_grad()
def check(attn: CrossAttention) -> None:
    dtype, device = attn.to_q.weight.dtype, attn.to_q.weight.device
    x = torch.randn(3, 7, 24, device=device).to(dtype)
    exact = published(copy.deepcopy(attn).double(), x.double())
    assert relative_error(attn(x).double(), exact) < TOLERANCE[dtype]
    assert relative_error(attn(x, add=x).double(), exact + x) < TOLERANCE[dtype]


def in_place(attn: CrossAttention) -> CrossAttention:
    with torch.no_grad():
        attn.to_k.weight.mul_(-2)
    return attn


def behind_its_back(attn: CrossAttention) -> CrossAttention:
    attn.to_v.weight.data.mul_(-2)  # which no version counter sees
    return attn


def replaced(attn: CrossAttention) -> CrossAttention:
    attn.to_q.weight = nn.Parameter(torch.randn_like(attn.to_q.weight))
    return attn


def pointed_elsewhere(attn: CrossAttention) -> CrossAttention:
    attn.to_v.weight.data = torch.randn_like(attn.to_v.weight)
    return attn


def loaded(attn: CrossAttention) -> CrossAttention:
    attn.load_state_dict(random_attention().state_dict())
    return attn


def assigned(attn: CrossAttention) -> CrossAttention:
    attn.load_state_dict(random_attention().state_dict(), assign=True)
    return attn


def stepped(attn: CrossAttention) -> CrossAttention:
    optimizer = torch.optim.AdamW(attn.parameters(), lr=0.1)
    attn(torch.randn(1, 5, 24)).square().sum().backward()
    optimizer.step()
    return attn


def cast_and_back(attn: CrossAttention) -> CrossAttention:
    check(attn.to(torch.bfloat16))
    return attn.to(torch.float32)


CHANGES: list[Callable[[CrossAttention], CrossAttention]] = [
    in_place,
    behind_its_back,
    replaced,
    pointed_elsewhere,
    loaded,
    assigned,
    stepped,
    cast_and_back,
    copy.deepcopy,
    lambda attn: attn.to(torch.float64),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_one_product_follows_every_change_of_the_weights(
    change: Callable[[CrossAttention], CrossAttention],
) -> None:
    attn = random_attention()
    check(attn)
    check(change(attn))


@pytest.mark.gpu
def test_one_product_follows_the_weights_to_a_gpu_and_back() -> None:
    attn = random_attention()
    for device in ("cpu", "cuda", "cpu"):
        check(attn.to(device))


def test_a_changed_copy_leaves_the_original_alone() -> None:
    attn = random_attention()
    check(attn)
    x = torch.randn(1, 5, 24)
    with torch.no_grad():
        before = attn(x)
        in_place(copy.deepcopy(attn))
        assert torch.equal(attn(x), before)


def test_names_values_and_files_stay_those_of_three_matrices(tmp_path: Path) -> None:
    attn = random_attention()
    before = {name: value.clone() for name, value in attn.state_dict().items()}
    check(attn)
    save_file(attn.state_dict(), tmp_path / "a.safetensors")
    saved = io.BytesIO()
    torch.save(attn.state_dict(), saved)
    saved.seek(0)
    for after in (
        attn.state_dict(),
        load_file(tmp_path / "a.safetensors"),
        torch.load(saved, weights_only=True),
    ):
        assert set(after) == set(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_weights_take_no_more_memory() -> None:
    attn = random_attention()
    check(attn)
    weights = [to.weight for to in (attn.to_q, attn.to_k, attn.to_v)]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    assert len(storages) == 1
    assert weights[0].untyped_storage().nbytes() == sum(weight.nbytes for weight in weights)


def test_gradients_are_those_of_three_products() -> None:
    attn = random_attention().double()
    check(attn)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *attn.parameters()]
    ours, exact = (
        torch.autograd.grad(out.square().sum(), leaves) for out in (attn(x), published(attn, x))
    )
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_that_cannot_be_moved_are_multiplied_all_the_same() -> None:
    with torch.inference_mode():
        attn = random_attention()
        check(attn)
    attn = random_attention()
    with torch.inference_mode():
        check(attn)
    stepped(attn)
    check(attn)
    with torch.no_grad():
        assert attn.to("meta")(torch.empty(2, 5, 24, device="meta")).shape == (2, 5, 24)


def test_attention_compiles_before_and_after_its_first_product() -> None:
    for run_first in (False, True):
        attn = random_attention()
        if run_first:
            check(attn)
        compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 5, 24)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), published(attn, x))
