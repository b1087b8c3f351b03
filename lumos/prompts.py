"""The words around a caption, in training data and in prompts."""

from __future__ import annotations

# In the released models' training data and in upstream's inference.
OFFICIAL_TEMPLATE = (
    "Generate a video with a resolution of {width}x{height}, consisting of {pictures} frames at {fps} frames per "
    "second, according to the following prompt:\n {prompt}"
)
PLAIN_TEMPLATE = "{prompt}"
TEMPLATES = {"official": OFFICIAL_TEMPLATE, "plain": PLAIN_TEMPLATE}


def read_template(template: str) -> str:
    """The template of a name, or the given one. ValueError where it has no place for the prompt."""
    text = TEMPLATES.get(template, template)
    if "{prompt}" not in text:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, or hold {{prompt}}; got {template!r}")
    try:
        fill(text, "", (32, 32), 1, 1)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"template may hold {{prompt}}, {{width}}, {{height}}, {{pictures}} and {{fps}}: {error!r}"
        ) from error
    return text


def fill(template: str, prompt: str, size: tuple[int, int], pictures: int, fps: int) -> str:
    """The text of a clip or a picture of size (H, W)."""
    height, width = size
    return template.format(prompt=prompt, width=width, height=height, pictures=pictures, fps=fps)
