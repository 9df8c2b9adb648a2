"""ZeRO-3 from a model on the meta device: DeepSpeed cuts one parameter after the other, and each cut is filled.

This is DeepSpeed's own way to a model that is whole nowhere, `deepspeed.zero.Init`. It converts a parameter as soon as
there is one: it broadcasts rank 0's, keeps this rank's cut and lets go of the rest. Its values would have to be there
before, so every rank, or rank 0 for all of them, would draw all of them. Here the parameter that is converted has no
values yet, and the cut gets its own. At any time a rank has the memory of at most one whole parameter.
"""

from typing import Any

import torch
from torch import nn

from strategies.layout import equal_cuts
from strategies.mesh import Place
from strategies.start import Initial, with_memory, write_initial


def cut(deepspeed: Any, model: nn.Module, initial: Initial, place: Place, dtype: torch.dtype, config: Any) -> None:
    """Cut and fill the parameters, in `dtype`. config: DeepSpeed's, whole. Collective."""
    first: Any = None
    for name, parameter in with_memory(model, dtype, place.device):
        if first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=config, dtype=dtype)
            first = parameter
        else:  # as DeepSpeed does with what a model gets after its zero.Init
            first.convert_to_zero_parameters(param_list=[parameter])
        converted: Any = parameter
        here = equal_cuts(tuple(converted.ds_shape), place.world_size)[place.rank]
        write_initial(converted.ds_tensor, initial, name, here)
        converted.ds_tensor[here.numel :].zero_()  # padding
        if converted.ds_secondary_tensor is not None:  # zero_hpz_partition_size: a second cut, of one machine's ranks
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                pass  # what is cut anew at the end is cut into both
