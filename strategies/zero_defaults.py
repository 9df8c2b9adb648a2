"""DeepSpeed's defaults that are made for large models, and what stands in their place here. Plain Python, no torch.

strategies/zero.py gives these to the engine, and the predicted books read the same, wherever the config file is silent.
"""


def replaced_defaults(parameters: int) -> dict[str, int]:
    """Keys of `zero_optimization` for a model of so many elements.

    Buckets of 5e8 elements would be allocated whole whatever the model's size, so they are capped at the model's
    size; and parameters of up to 1e5 elements would stay whole under ZeRO-3, which is most of a small model: the
    threshold is 0.
    """
    return {
        "reduce_bucket_size": min(500_000_000, parameters),
        "stage3_prefetch_bucket_size": min(50_000_000, parameters),
        "stage3_param_persistence_threshold": 0,
    }
