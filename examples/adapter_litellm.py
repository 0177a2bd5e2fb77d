"""Requests with litellm under a budget: the one that crosses the limit is the last one.

    python examples/adapter_litellm.py

Needs `pip install "stroma-runner[litellm]"`, and neither a key nor a network. Prints:

> it is 4 C
> stopped in 'model' after 2 requests
"""

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm

from stroma import BudgetExceeded, ExecutionBudget, StromaRunner
from stroma.adapters import Guard
from stroma.adapters.litellm import attach

guard = Guard(StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=40)))
attach(litellm, guard)
asked = [{"role": "user", "content": "How warm is it?"}]

with guard.run() as run:
    try:
        for number in range(9):
            response = litellm.completion(model="gpt-4o", messages=asked, mock_response="it is 4 C")
            if number == 0:
                print(">", response.choices[0].message.content)
    except BudgetExceeded:
        pass

assert run.stopped is not None
requests = list(run.result.trace.walk())
print(f"> stopped in {run.stopped.node_id!r} after {len(requests)} requests")
