"""Of the measurements that have more to them than numbers."""
