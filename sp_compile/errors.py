"""The one family of errors that this library raises."""


class SequenceParallelError(RuntimeError):
    """Base of every error of `sp_compile`; its text says what was met, where, and what to do."""


class ConfigurationError(SequenceParallelError, ValueError):
    """An option, a group size or a device mesh that cannot be used."""


class CaptureError(SequenceParallelError):
    """A Dynamo graph that cannot be re-traced safely; the backend then runs it unsharded."""


class RuleError(SequenceParallelError, ValueError):
    """A sharding rule that does not parse, or does not fit the operator that it is given for."""


class FallbackError(SequenceParallelError):
    """With `strict=True`: something ran on gathered values that could not be sharded."""
