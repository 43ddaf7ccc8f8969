"""How parameters move: optimizers, the learning rate's schedule, and what is trained of a model."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from pairdr.config import TrainConfig
from pairdr.dropout import use_dropout
from pairdr.encoder import DualEncoder
from pairdr.errors import MissingExtraError, UsageError
from pairdr.ranks import find_rank


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW, or LAMB with the paper's settings (PAIR on MS MARCO); AdamW decays weight matrices only.

    Paddle's LAMB decays every parameter by 0.01 unless told otherwise, and PAIR's runs did not tell it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "lamb":
        try:
            from pytorch_optimizer import Lamb
        except ImportError as error:
            raise MissingExtraError("pytorch-optimizer", "train") from error
        lamb: torch.optim.Optimizer = Lamb(
            trained,
            lr=config.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-6,
            weight_decay=config.weight_decay,
            weight_decouple=False,  # decay inside the trust ratio, as Paddle's
            adam_debias=True,  # no correction of the rate on top of the trust ratio
        )
        vars(lamb)["clamp"] = math.inf  # Paddle's trust ratio has no upper bound
        return lamb
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def schedule_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    Linear up over the warm-up, then linear down to 0. `linear` starts the way down from the full rate, as transformers
    does; `paper` from what is left at that step of a way down that began at 0, as the official code does.
    """
    rise = math.ceil(config.warmup_steps * steps) if config.warmup_steps < 1 else int(config.warmup_steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    begin = 0 if config.lr_schedule == "paper" else rise
    return max(0.0, (steps - step) / max(1, steps - begin))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators for one step: a function of seed, step and rank, so that a resumed run repeats it."""
    digest = hashlib.sha256(f"{seed}/{step}/{find_rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))


def bound_gradient(table: Tensor) -> None:
    """Add up the rows of a sparse gradient that occur twice, once it has more rows than its table.

    Every forward pass appends a row a token; so, however many passes a step has, a gradient has twice its table's rows
    at most.
    """
    gradient = table.grad
    if gradient is not None and gradient.is_sparse and gradient._nnz() > len(table):
        table.grad = gradient.coalesce()


def densify_gradients(model: nn.Module) -> None:
    """Make the gradients of embedding tables dense: once a step, not once a forward pass."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.grad is not None and module.weight.grad.is_sparse:
            module.weight.grad = module.weight.grad.coalesce().to_dense()


@contextmanager
def prepare_model(encoder: DualEncoder, config: TrainConfig) -> Iterator[nn.Module]:
    """Make an encoder ready for training while the block runs; yield the module whose parameters are trained.

    Dropout, sparse gradients of embedding tables (CPU), attention, gradient checkpointing, LoRA. Afterwards the model
    is a plain one again, with LoRA's matrices merged into its weights.
    """
    with ExitStack() as stack:
        transformers: list[Any] = [m for m in encoder.model.modules() if isinstance(m, Transformer)]
        for transformer in transformers:  # one, or one for each side
            body = transformer.model
            if config.lora_rank is not None:
                transformer.model = _add_lora(body, config.lora_rank, config.seed)
                stack.callback(_merge_lora, transformer)
            if config.attn_implementation != "auto":
                stack.callback(_set_attention, body, body.config._attn_implementation)
                _set_attention(body, config.attn_implementation)
            if config.gradient_checkpointing:
                try:
                    body.activation_checkpointing_enable()
                except ValueError as error:
                    raise UsageError(f"gradient_checkpointing: {error}") from error
                stack.callback(body.activation_checkpointing_disable)
        if encoder.model.device.type == "cpu":
            for module in encoder.model.modules():
                if isinstance(module, nn.Embedding) and not module.sparse:
                    module.sparse = True
                    stack.callback(setattr, module, "sparse", False)
                    if module.weight.requires_grad:
                        stack.callback(module.weight.register_post_accumulate_grad_hook(bound_gradient).remove)
        stack.enter_context(use_dropout(encoder.model, config.dropout))
        yield encoder.model


def _set_attention(body: Any, name: str) -> None:
    try:
        body.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise UsageError(f"attn_implementation {name}: {error}") from error


def _add_lora(body: nn.Module, rank: int, seed: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    torch.manual_seed(seed)  # half of the matrices begin at random: alike in every run and on every rank
    with warnings.catch_warnings():  # peft asks by a name that transformers has replaced
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: nn.Module = get_peft_model(body, adapter)
    return adapted


def _merge_lora(transformer: Any) -> None:
    transformer.model = transformer.model.merge_and_unload().requires_grad_()  # peft froze all but its own
