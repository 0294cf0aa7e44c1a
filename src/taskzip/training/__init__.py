"""Light retraining and distillation."""

from taskzip.training.retraining import Loss, Retraining, retrain

__all__ = ["Loss", "Retraining", "retrain"]
