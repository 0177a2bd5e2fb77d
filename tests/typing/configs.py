"""Configurations, as type checkers see them: names of failure classes will do, and a keyword that nothing has
is an error."""

from __future__ import annotations

from typing import assert_type

from stroma import ExecutionBudget, FailureClass, FailurePolicy, NodeHooks, RunConfig, StromaRunner
from stroma.failures.policy import PolicyMap, default_policy_map

patient = FailurePolicy(max_retries=5)

by_name = RunConfig(policy_map={"RECOVERABLE": patient}, node_policies={"search": {"AMBIGUOUS": patient}})
by_class = RunConfig(policy_map={FailureClass.RECOVERABLE: patient}, tags=["nightly"], user="ada")
assert_type(by_name.policy_map, PolicyMap)

defaults: PolicyMap = default_policy_map()
runner = StromaRunner.quick(
    store="runs.db",
    budget=ExecutionBudget(max_cost_usd=0.5),
    policy_map=defaults,
    hooks=[NodeHooks()],
    contract_retries={"extract": 2},
    if_exists="resume",
)
runner.with_policy_map({"TERMINAL": patient}).with_node_policies({"search": defaults})

StromaRunner.quick(max_cost_usd=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
StromaRunner.quick(if_exists="again")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
RunConfig(policy_map={"RECOVERABLE": 3})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
RunConfig(budgets=ExecutionBudget())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
