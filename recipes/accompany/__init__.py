"""From a vocal to its accompaniment: `generate`, `render`, `separate`, and the bundle they load."""
