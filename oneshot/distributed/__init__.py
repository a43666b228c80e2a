"""The one place that knows processes: ranks, accelerate, DeepSpeed engines, and how a failure ends a run."""
