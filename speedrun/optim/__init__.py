"""Optimizer rules, the policy table and schedules. Imports no strategy: how a rule meets shards is not its business."""
