"""One rank of the doctor's collective: python -m shardrun.doctor.collective_rank BACKEND RANK WORLD_SIZE PORT.

Prints what it is about to do, so that whoever waits for it knows where it stopped.
"""

import os
import sys
import time


def main() -> None:
    backend, rank, world_size, port = sys.argv[1], *map(int, sys.argv[2:5])
    print("loading torch", flush=True)
    import torch
    import torch.distributed as dist

    print("meeting the other rank", flush=True)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    elif not os.environ.get("GLOO_SOCKET_IFNAME"):  # as strategies.select does it
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    bound = torch.device("cuda", rank) if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
    print("summing", flush=True)
    device = "cuda" if backend == "nccl" else "cpu"
    dist.all_reduce(torch.zeros(1, device=device))  # connects
    numbers = torch.full((2**18,), float(rank + 1), device=device)  # 1 MiB
    started = time.perf_counter()
    dist.all_reduce(numbers)
    total = float(numbers[0])  # waits for it
    milliseconds = (time.perf_counter() - started) * 1e3
    expected = world_size * (world_size + 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"the sum of 1 to {world_size} came out as {total}, not {expected}")
    print(f"done {milliseconds:.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
