"""Components that a teacher does without and that plain `from_pretrained` insists on."""

from diffusers import DiffusionPipeline


def absent_components(pipeline: DiffusionPipeline) -> tuple[str, ...]:
    """Names of the components that are None and that the class of the pipeline does not call optional."""
    optional = set(pipeline._optional_components)
    return tuple(name for name, part in pipeline.components.items() if part is None and name not in optional)
