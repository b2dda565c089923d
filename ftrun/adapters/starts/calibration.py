"""LoRA initialisations that look at training data first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ftrun.errors import ComponentError, ConfigError
from ftrun.training.gradients import backward

if TYPE_CHECKING:
    from peft import LoraConfig

    from ftrun.data.batches import Batch

EVA_PASSES = 50  # over the calibration batches, before EVA is given up as not converging


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    """A batch as transformers' keyword arguments; labels are -100 where nothing is trained."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "labels": batch.input_ids.masked_fill(batch.loss_weight <= 0, -100),
    }


def eva(model: Any, config: LoraConfig, batches: list[Batch]) -> None:
    """Explained variance adaptation (Paischer et al., 2024, arXiv:2410.07170): A = principal directions of each layer's input."""
    from peft import initialize_lora_eva_weights

    assert config.eva_config is not None
    components = round(max([config.r, *(config.rank_pattern or {}).values()]) * config.eva_config.rho)
    loaded = [inputs_of(batch) for batch in batches]
    column = "labels" if config.eva_config.use_label_mask else "attention_mask"
    enough = [one for one in loaded if int((one[column] > 0).sum()) >= components]
    if not enough:
        raise ConfigError(
            f"EVA needs micro-batches of at least {components} trained tokens (r times rho), and none has as many",
            "adapter.init_lora_weights=eva",
            "Lower adapter.r, use adapter.eva_config={rho: 1.0}, or raise train.batch_size and train.batch_tokens.",
        )

    # every process calibrates on the same batches: nothing to gather
    initialize_lora_eva_weights(model, Passes(enough), gather_distributed_inputs=False, show_progress_bar=False)


class Passes(list[dict[str, Tensor]]):
    """Batches that may be gone through `EVA_PASSES` times: peft would repeat them for ever where nothing settles."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(EVA_PASSES):
            yield from super().__iter__()
        raise ComponentError(
            f"EVA's directions did not settle in {EVA_PASSES} passes over {len(self)} calibration batches",
            "adapter.init_lora_weights=eva",
            "Raise adapter.calibration_batches, or lower adapter.r or eva_config.tau.",
        )


def corda(model: nn.Module, config: LoraConfig, batches: list[Batch]) -> None:
    """Context-oriented decomposition (Yang et al., 2024, arXiv:2406.05223): covariance of the inputs, one sequence at a time."""
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for batch in batches:
            for number in range(batch.sequences):
                model(input_ids=batch.input_ids[batch.sequence == number][None])

    training = model.training
    preprocess_corda(model, config, run_model=run)
    model.train(training)


def lora_ga(model: nn.Module, config: LoraConfig, batches: list[Batch]) -> None:
    """Gradient approximation (Wang et al., 2024, arXiv:2407.05000): A and B from the gradient of the full weight."""
    from peft.tuners.lora.loraga import preprocess_loraga

    def run() -> None:
        for batch in batches:
            backward(model(**inputs_of(batch)).loss)

    preprocess_loraga(model, config, train_step=run)
