"""The learning rate of a step."""

from torch.optim import Optimizer

from fedmkt.protocol import OptimizerConfig


def set_rates(optimizer: Optimizer, config: OptimizerConfig, steps_before: int) -> None:
    """Linear warm-up over all of a party's steps, then constant; decay where a group of parameters wants it."""
    warmed = min(1.0, (steps_before + 1) / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * warmed
        group["weight_decay"] = config.weight_decay if group["decay"] else 0.0
