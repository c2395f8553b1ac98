"""`rocketkv+` part by part, at equal bytes read."""
