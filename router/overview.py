"""What the router can tell of the model and of the cluster, over HTTP and gRPC alike."""

from router.generation import Generator
from router.prepare import ServedModel
from router.responses import Health, Model


class Overview:
    """The served model, as far as the engines that are known hold it."""

    def __init__(self, generator: Generator, model: ServedModel) -> None:
        self._generator = generator
        self._model = model

    def context(self) -> int:
        """The longest sequence that some engine can hold, in tokens, as far as engines are known."""
        status = self._generator.status()
        held = [engine.max_sequence_tokens for engine in status.engines if engine.max_sequence_tokens > 0] if status else []
        return min(self._model.max_model_len, max(held, default=self._model.max_model_len))

    def card(self) -> Model:
        """The model as /v1/models tells it."""
        model = self._model
        return Model(id=model.name, created=model.created, root=model.root or model.name, max_model_len=self.context())

    @property
    def leaving(self) -> bool:
        """Whether this process is to end."""
        return self._generator.leaving

    def health(self) -> Health:
        """'ok' where an engine is ready; the reason where none is."""
        status = self._generator.status()
        engines = status.engines if status else []
        ready = sum(engine.ready for engine in engines)
        counts = {"ready": ready, "total": len(engines)}
        if ready:
            return Health(status="ok", engines=counts)
        causes = sorted({engine.reason for engine in engines if engine.reason})
        reason = ": ".join(["no engine is ready", *causes]) if status else "the scheduler has not been heard of"
        return Health(status="unavailable", reason=reason, engines=counts)
