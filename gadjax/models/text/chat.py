"""Chat templates: a prompt as the turn of a user, for language models that encode text."""

from importlib.util import find_spec

from gadjax.errors import InputError
from gadjax.models.text.tokenizer import Tokenizer

# One turn of the user in the published template of Qwen3, and the assistant's start.
QWEN3 = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TRIAL = " a red\n circle "  # shows whether a template strips


def check_template(tokenizer: Tokenizer, template: str, **options: bool) -> None:
    """Check that the tokenizer's own chat template, a program in jinja2, gives the same text.

    The prompts themselves are formatted by `template`, so that jinja2 is not needed; where it is
    not installed, only the presence of a template is checked.

    Args:
      tokenizer: of a pipeline folder.
      template: text with {} for the prompt.
      options: what the pipeline in diffusers passes to apply_chat_template.

    Raises: InputError if there is no template, or it is another one.
    """
    where, backend = tokenizer.backend.name_or_path, tokenizer.backend
    if not backend.chat_template:
        raise InputError(f"{where}: found no chat template; expected that of Qwen3")
    if find_spec("jinja2") is None:
        return
    try:
        text = backend.apply_chat_template(
            [{"role": "user", "content": TRIAL}],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
    except Exception as error:  # of any kind: the template is a program
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where}: found an unusable chat template ({reason}); expected that of Qwen3"
        ) from error
    if text != template.format(TRIAL):
        raise InputError(
            f"{where}: found a chat template that gives {text[:200]!r}; expected "
            f"{template.format(TRIAL)!r}"
        )
