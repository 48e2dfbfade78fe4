"""The streaming service: a pure core (windows, incidents, detector) and a thin shell around it."""
