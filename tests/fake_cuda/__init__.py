"""A machine with CUDA GPUs that are not there, for runs on a machine without one: it shows which calls a GPU would get,
not what it would compute.

Real: everything on the host (the model as it is built, data, batches, records, the files of a checkpoint); on the
device every operator's shapes, dtypes, views and devices, from torch's own formulas for fake tensors (FakeTensorMode);
autograd's graph and engine; autocast with CUDA's lists of operators, which a CPU build of torch has inside; the engines
(DistributedDataParallel, fully_shard) and the optimizer.

Fake:
- The bytes of whatever lies on the device. A number that the host asks for (`item`, `tolist`, a copy) is one where it
  is a floating-point number, else zero; `nonzero` finds two places.
- The device itself: streams, events, memory statistics (`device.py`), the guard and the hooks by which torch's C++
  knows of it (`shim.cpp`). It says that it is a Hopper. All GPUs of the machine share one index.
- No kernel runs, neither torch's nor ours: what is asked of one stands in `functions.py`, and is asserted.
- torch.compile: functions run as they are. What compiled code does not bear is asserted too.
- The other ranks: collectives end at once (strategies/ledger/fake.py).

The hooks have to be there before torch is imported, so all of it happens in a process of its own (`process.py`).
"""
