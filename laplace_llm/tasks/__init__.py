"""Question-answering tasks: where their rows come from, how they are asked, what the answers are.

``load_task("boolq")`` returns one of the paper's six tasks, or another registered one;
`register_task` adds one's own.
"""

from laplace_llm.tasks import catalogue as _catalogue  # noqa: F401  # registers its tasks
from laplace_llm.tasks.hub import Hub
from laplace_llm.tasks.jsonl import read_jsonl
from laplace_llm.tasks.prompts import Template
from laplace_llm.tasks.registry import Task, load_task, register_task, registered_tasks

__all__ = [
    "Hub",
    "Task",
    "Template",
    "load_task",
    "read_jsonl",
    "register_task",
    "registered_tasks",
]
