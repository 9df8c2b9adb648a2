"""DDP's books for the run that is shown, predicted: what the same model and batch take with nothing sharded.

Plain Python, from the run's own config.json, so that a presentation needs no torch for it.
"""

from typing import Any

from speedrun.books.forward_pass import ForwardPass
from speedrun.books.shapes import scenario_of
from speedrun.config import Config, DataConfig, ModelConfig, OptimizerConfig
from speedrun.stages import resolve_stages
from strategies.catalogue import WHOLE
from strategies.forecast.predict import predict_after_forward, predict_memory


def under_ddp(config: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Moment → category → bytes on a rank, of a run's config.json; nothing where there is nothing to compare.

    That is on one rank, under DDP itself, and for a run in stages, whose batch is not that of the config's fields.
    """
    launch, run = config["launch"], config["run"]
    if launch["world_size"] == 1 or launch["strategy"] == WHOLE or run["schedule"]["stages"]:
        return {}
    model = ModelConfig(**_tuples(run["model"]))
    ours = Config(model, OptimizerConfig(**_tuples(run["optimizer"])), data=DataConfig(**run["data"]))
    [stage] = resolve_stages(ours, run["steps"], launch["world_size"])
    scenario = scenario_of(ours, WHOLE, launch["world_size"], launch["precision"], stage.batches.accumulation, {})
    forward = ForwardPass(model, stage.batches.micro_batch, stage.sequence_length)
    after_forward = {**predict_after_forward(scenario)[0], "activations": forward.predict(scenario).total}
    return {
        **predict_memory(scenario)[0],
        "after forward": after_forward,
        "peak": forward.predict_peak(scenario)[0],
    }


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where settings have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
