"""Choosing a setting by measurement: traces, replays, quality on the user's own text."""
