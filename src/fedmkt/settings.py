"""Reading a service's settings at the start of its command, before anything heavy is imported."""

import sys
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def read_settings(model: type[Model], given: dict[str, Any]) -> Model:
    """`model` from its environment variables, with what is `given` (and not None) over them.

    What is wrong is printed, each setting with its FEDMKT_ variable, and the program ends with status 2.
    """
    try:
        return model(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for each in error.errors():
            name = ".".join(str(part) for part in each["loc"])
            hint = f" (option, or FEDMKT_{name.upper()})" if name else ""
            print(f"{name + ': ' if name else ''}{each['msg']}{hint}", file=sys.stderr)
        raise SystemExit(2) from error
