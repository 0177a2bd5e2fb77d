"""Two typed steps; the first call times out and is repeated; every attempt is listed."""

from world import Reply, Sorted, Ticket, ask_for_topic

from stroma import FailurePolicy, StromaRunner

policy = FailurePolicy(max_retries=3, backoff_seconds=0.1)
runner = StromaRunner.quick(policy_map={"RECOVERABLE": policy})


@runner.node
async def sort(ticket: Ticket) -> Sorted:
    return Sorted(text=ticket.text, topic=await ask_for_topic(ticket.text))


@runner.node
async def reply(state: Sorted) -> Reply:
    return Reply(topic=state.topic, reply=f"We look into it: {state.text}")


result = runner.run_sync([sort, reply], Ticket(text="My invoice is wrong"))
for event in result.trace:
    print(event.node_id, event.attempt, event.outcome)
print(result.final_state)
