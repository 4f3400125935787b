"""A party's own wide knowledge as a local file, every bit kept: what the wire format rounds, a restart must not.

For the party's own disk; what comes from others is `fedmkt.knowledge.decode`'s business.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedmkt.errors import Refusal
from fedmkt.knowledge import Knowledge, KnowledgeHeader

COLUMNS = ("samples", "row_splits", "context_ends", "gold_logprobs", "entry_splits", "token_ids", "logprobs")


class KnowledgeFileUnreadable(Refusal):
    code = "knowledge_file.unreadable"
    title = "The saved knowledge cannot be used"


def write_knowledge_file(path: Path, knowledge: Knowledge) -> None:
    """Replace `path` by this knowledge; a crash leaves the old file or the new one."""
    draft = path.with_name(f".{path.name}.new")
    header = json.dumps(asdict(knowledge.header))
    save_file({name: getattr(knowledge, name) for name in COLUMNS}, draft, metadata={"header": header})
    draft.replace(path)


def read_knowledge_file(path: Path) -> Knowledge:
    """The knowledge that was written. Raises KnowledgeFileUnreadable."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = KnowledgeHeader(**json.loads(file.metadata()["header"]))
            return Knowledge(header=header, **{name: file.get_tensor(name) for name in COLUMNS})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KnowledgeFileUnreadable(f"{path.name} does not read: {error}; it will be made anew") from error
