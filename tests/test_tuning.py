"""How parameters move: schedules, optimizers, and a model that is made ready for training and left as it was."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import make_config, open_start

from pairdr.encoder import DualEncoder
from pairdr.errors import MissingExtraError, UsageError
from pairdr.tuning import densify_gradients, make_optimizer, prepare_model, schedule_rate, seed_step, set_rate

if TYPE_CHECKING:
    from conftest import Parts


@pytest.fixture
def encoder(toy_parts: Parts) -> DualEncoder:
    """Return the start model, to be changed at will."""
    return open_start(toy_parts)


# --- the schedule -----------------------------------------------------------------------------------------------------


def list_rates(steps: int, count: int, warmup: float, schedule: str = "linear") -> list[float]:
    config = make_config(warmup_steps=warmup, lr_schedule=schedule)
    return [schedule_rate(step, steps, config) for step in range(count)]


def test_the_rate_rises_over_a_share_of_the_steps_and_falls_to_nothing() -> None:
    rates = list_rates(20, 21, 0.25)
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 21)])
    assert rates[-1] == 0.0


def test_a_warm_up_of_whole_steps_is_taken_as_such() -> None:
    assert list_rates(10, 4, 2) == pytest.approx([1 / 3, 2 / 3, 1.0, 7 / 8])
    assert list_rates(10, 1, 0) == [1.0]


def test_the_papers_way_down_began_at_the_first_step() -> None:
    rates = list_rates(20, 21, 0.25, "paper")
    assert rates[:5] == list_rates(20, 5, 0.25)
    assert rates[5:] == pytest.approx([1 - step / 20 for step in range(5, 21)])


def test_without_a_warm_up_both_schedules_are_one() -> None:
    assert list_rates(7, 8, 0, "paper") == list_rates(7, 8, 0)


@pytest.mark.parametrize("schedule", ["linear", "paper"])
def test_the_rate_never_falls_below_zero(schedule: str) -> None:
    assert list_rates(20, 26, 0.1, schedule)[-1] == 0.0
    assert all(0 < rate < 1 for rate in list_rates(5, 5, 30, schedule))


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_only_weight_matrices_decay(encoder: DualEncoder) -> None:
    groups = make_optimizer(encoder.model, make_config(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.dim() > 1 for parameter in groups[0]["params"])
    assert all(parameter.dim() == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.model.parameters()))


def test_frozen_parameters_are_in_no_group(encoder: DualEncoder) -> None:
    frozen = next(encoder.model.parameters()).requires_grad_(False)
    for optimizer in ("adamw", "lamb"):
        groups = make_optimizer(encoder.model, make_config(optimizer=optimizer)).param_groups
        found = [parameter for group in groups for parameter in group["params"]]
        assert len(found) == len(list(encoder.model.parameters())) - 1
        assert not any(parameter is frozen for parameter in found)


def test_lamb_has_the_papers_settings_and_decays_every_parameter(encoder: DualEncoder) -> None:
    (group,) = make_optimizer(encoder.model, make_config(optimizer="lamb", weight_decay=0.02)).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-6, 0.02)
    assert len(group["params"]) == len(list(encoder.model.parameters()))


def test_lamb_moves_every_parameter_by_the_rate_times_its_norm() -> None:
    """You et al., arXiv 1904.00962: whatever the gradients, |step| = learning rate x |parameter|, from step 1 on."""
    torch.manual_seed(13)
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.mul_(100)  # a norm of some 100: the trust ratio has no upper bound
    optimizer = make_optimizer(layer, make_config(optimizer="lamb", learning_rate=0.01))
    for _ in range(4):
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        for old, new in zip(before, layer.parameters(), strict=True):
            assert float((new.detach() - old).norm() / old.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("missing", "option"), [("pytorch_optimizer", {"optimizer": "lamb"}), ("peft", {"lora_rank": 2})]
)
def test_what_needs_the_train_extra_names_it(
    encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch, missing: str, option: dict[str, object]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    config = make_config(**option)
    with pytest.raises(MissingExtraError, match=r"pairdr\[train\]"), prepare_model(encoder, config) as model:
        make_optimizer(model, config)


def test_the_rate_is_that_of_every_group(encoder: DualEncoder) -> None:
    optimizer = make_optimizer(encoder.model, make_config())
    set_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_random_numbers_are_a_function_of_seed_and_step() -> None:
    drawn = []
    for seed, step in ((1, 1), (1, 1), (1, 2), (2, 1), (1, 12), (11, 2)):
        seed_step(seed, step)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 5


# --- a model made ready -----------------------------------------------------------------------------------------------


def test_a_sparse_gradient_never_has_many_more_rows_than_its_table(encoder: DualEncoder) -> None:
    with prepare_model(encoder, make_config()) as model:
        tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
        sums = [torch.zeros_like(table) for table in tables]
        for _ in range(40):
            for table, total in zip(tables, sums, strict=True):
                ids = torch.randint(len(table), (7,))
                F.embedding(ids, table, sparse=True).sum().backward()
                total.index_add_(0, ids, torch.ones(7, table.shape[1]))
                assert table.grad is not None
                assert table.grad._nnz() <= len(table) + 7
        densify_gradients(model)
        for table, total in zip(tables, sums, strict=True):
            assert torch.equal(table.grad, total)
    assert not any(table._post_accumulate_grad_hooks for table in tables)


def test_gradients_of_tables_become_dense_and_keep_their_values() -> None:
    table = nn.Embedding(6, 2, sparse=True)
    table(torch.tensor([1, 3, 1])).sum().backward()
    densify_gradients(nn.Sequential(table, nn.Linear(2, 2)))
    assert table.weight.grad is not None
    assert not table.weight.grad.is_sparse
    assert table.weight.grad[:, 0].tolist() == [0.0, 2.0, 0.0, 1.0, 0.0, 0.0]


def list_traits(encoder: DualEncoder) -> list[object]:
    """Return what training changes about a model besides its weights."""
    body = encoder.model[0].model
    modules = [(name, type(m), getattr(m, "p", None), getattr(m, "sparse", None)) for name, m in body.named_modules()]
    trained = [(name, parameter.requires_grad) for name, parameter in encoder.model.named_parameters()]
    return [*modules, *trained, body.is_activation_checkpointing, body.config._attn_implementation]


READY = {
    "plain": {},
    "dropout": {"dropout": 0.4},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "attention": {"attn_implementation": "eager"},
    "lora": {"lora_rank": 2},
    "both": {"lora_rank": 2, "gradient_checkpointing": True, "dropout": 0.0},
}


@pytest.mark.parametrize("case", READY)
@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_the_model_is_as_it_was(encoder: DualEncoder, case: str, fails: bool) -> None:
    traits, weights = list_traits(encoder), encoder.hash_weights()
    try:
        with prepare_model(encoder, make_config(**READY[case])):
            assert any(module.sparse for module in encoder.model.modules() if isinstance(module, nn.Embedding))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert list_traits(encoder) == traits
    assert encoder.hash_weights() == weights


def test_activations_are_recomputed_while_the_model_is_trained(encoder: DualEncoder) -> None:
    calls: list[int] = []
    encoder.model[0].model.encoder.layer[0].intermediate.register_forward_hook(lambda *_: calls.append(1))
    for option, expected in ((False, 1), (True, 2)):
        calls.clear()
        with prepare_model(encoder, make_config(gradient_checkpointing=option)) as model:
            model.train()
            encoder.embed(encoder.tokenize_queries(["which river"])).sum().backward()
        assert len(calls) == expected


def test_a_model_that_cannot_recompute_is_refused(encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(encoder.model[0].model), "supports_gradient_checkpointing", False)
    with (
        pytest.raises(UsageError, match="gradient_checkpointing: BertModel does not support"),
        prepare_model(encoder, make_config(gradient_checkpointing=True)),
    ):
        pass


def test_attention_is_the_one_that_was_asked_for(encoder: DualEncoder) -> None:
    tokens = encoder.tokenize_queries(["which river"])
    config = encoder.model[0].model.config
    before = config._attn_implementation
    found = {}
    for name in ("eager", "sdpa"):
        with prepare_model(encoder, make_config(attn_implementation=name, dropout=0.0)):
            assert (config._attn_implementation == "eager") == (name == "eager")
            found[name] = encoder.embed(tokens).detach()
        assert config._attn_implementation == before
    assert torch.allclose(found["eager"], found["sdpa"], atol=1e-6)


def test_flash_attention_needs_half_precision() -> None:
    with pytest.raises(UsageError, match="flash_attention_2', which needs bf16 or fp16"):
        make_config(attn_implementation="flash_attention_2")


def test_attention_that_is_not_installed_is_refused(encoder: DualEncoder) -> None:
    with (
        pytest.raises(UsageError, match="attn_implementation flash_attention_2: "),
        prepare_model(encoder, make_config(attn_implementation="flash_attention_2", bf16=True)),
    ):
        pass


def test_with_low_rank_additions_nothing_else_is_trained(encoder: DualEncoder) -> None:
    plain = sum(parameter.numel() for parameter in encoder.model.parameters())
    counts = {}
    for rank in (1, 2):
        fresh = DualEncoder(encoder.model, encoder.contract, encoder.temperature, encoder.is_retriever)
        with prepare_model(fresh, make_config(lora_rank=rank)) as model:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert all("lora_" in name for name in trained)
            counts[rank] = sum(parameter.numel() for parameter in trained.values())
    assert counts[2] == 2 * counts[1] > 0
    assert sum(parameter.numel() for parameter in encoder.model.parameters()) == plain
