"""An answer is repaired and booked; it is paid for once, within a budget, although the process is killed in between."""

from world import Invoice, Mail, ask_for_euros, crash_if_asked

from stroma import ExecutionBudget, FailurePolicy, StromaRunner, current_node

runner = StromaRunner.quick(
    store="runs.db",
    budget=ExecutionBudget(max_cost_usd=0.10),
    policy_map={"RECOVERABLE": FailurePolicy(max_retries=3, backoff_seconds=0.1)},
    contract_retries={"extract": 2},
)


@runner.node
async def extract(mail: Mail) -> tuple[Invoice, object]:
    failed = current_node().last_failure
    response = await ask_for_euros(mail.text, failed.as_prompt() if failed else None)
    return response["answer"], response


@runner.node
async def book(invoice: Invoice) -> Invoice:
    crash_if_asked()
    return invoice


result = runner.run_sync([extract, book], Mail(text="Twelve EUR"), run_id="mail-7", resume=True)
print(result.final_state, f"${result.total.cost_usd:.6f}")
