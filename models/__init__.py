"""The networks, their training, their scores and the tail threshold: numbers only, never imports `stream`."""
