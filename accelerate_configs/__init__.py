"""The accelerate config files: one per strategy for 8×H100, the same names on the CPU (`cpu`) and on two machines.

The folder is a package only so that the files travel in the wheel:
`importlib.resources.files("accelerate_configs") / "cpu" / "ddp.yaml"` finds them wherever Shardrun is installed.
"""
