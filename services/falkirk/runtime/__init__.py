"""The process shell that all services share: serve, drain, settings, replicas, workers, telemetry."""
