"""The page about the guarantees: their sentences, what they mean, and the tests that name them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: The guarantees by number.
SENTENCES = {
    1: "A node's function sees only input that passed its contract; output that failed its contract is never "
    "committed or handed on.",
    2: "Every exception gets exactly one failure class, whatever the exception or a classifier does.",
    3: "`max_retries=N` is N attempts after the first; TERMINAL is never retried; Retry-After is obeyed.",
    4: "Paid work is saved: a valid output is committed before a budget, a hook or a cancellation can lose "
    "it.",
    5: "A committed node is not executed again in that execution of the run: not after `kill -9`, not on "
    "resume.",
    6: "All reported usage counts, also of failed attempts and earlier processes; past a limit no further call is "
    "made.",
    7: "The trace has one event per attempt, and later changes to objects do not reach it ([large "
    "maps](map.md) trace their first thousands).",
    8: "A hook cannot change an outcome, re-run a node or lose a result, and delays it by at most its time "
    "limit.",
    9: "Every start event has exactly one end event, however the attempt ended.",
    10: "A run has one owner: a second process is refused, or takes over once the first is gone; stale writes "
    "are refused.",
    11: "Data from a store is validated by your own schema; nothing stored is executed or imported.",
    12: "Unused features cost nothing, and the cost of a node does not grow with the number of nodes.",
    13: "An [effect](concepts/effects.md) is called again only after a statement that the earlier call did "
    "not happen.",
}

#: What each guarantee means for whoever relies on it.
MEANS = {
    1: "The node that returned the bad value fails, and the failure names the field. This holds at every boundary: from node to node, "
    "into and out of groups, for single steps, for values from a store, and inside agent frameworks. The bad value itself is stored with "
    "the failure for debugging. Only two readers see it: failure hooks in `exc.raw` (through `redact`), and the next attempt of the node "
    "in `last_failure`.",
    2: "So you can write a policy for every case. This includes exceptions whose `str()` raises, classifiers that raise, and exception "
    "groups with several members.",
    3: "All classes of failures share the N retries of a position. A delay is at least the wait that the server asks for, in a "
    "header or in the body. A TypeError or AttributeError that repeats at one line of your code [ends the retries](concepts/failures.md).",
    4: "The commit follows directly after the validation of the output. Budgets, hooks, cancellations and shutdowns take effect after it.",
    5: "Holds on a journal store. Only a node that was in flight when the process died may run twice. If it changes something outside, "
    "pass `current_node().idempotency_key` on. A new execution of the same run id runs everything again.",
    6: "Holds across processes on a journal store, else in one process. The price of a call is known only afterwards, so the call that "
    "crosses a limit is made, and the next one is not. The usage of a call in flight when a process is killed cannot be known. "
    "Usage that a thread reports after the time limit of its node is not counted.",
    7: "An event is a snapshot with the input and output at that time, and with usage, class and duration. The trace of a "
    "[map into a file](map.md) has the first thousands of items, and counts the rest.",
    8: "Hooks are awaited under a time limit (`hook_timeout_ms`), outside of the node's error handling. A hook that blocks the event "
    "loop cannot be interrupted; a warning names it. The one exception is a hook that is not async: TypeError. "
    "[Usage that a start hook reports](prices.md) counts like that of its node.",
    9: "Holds within a live process: success, failure, cancelled or suspended. After a crash, the next process calls the missing hooks "
    'if `hook_delivery="at_least_once"` is set.',
    10: "Holds on a journal store. A lease names the owner of the run, and an epoch makes late writes of an earlier owner fail: Fenced.",
    11: "The format is JSON with a checksum, with a tagged encoding for values that JSON lacks. Class names in a store are compared, never "
    "imported.",
    12: "Without hooks no state is prepared for them, and without a budget nothing is added up. A node costs the same in a pipeline of "
    "5,000 as in one of 100: see the [figures](performance.md).",
    13: "Holds for nodes with `effect=True`, across processes on a journal store, else in one process. The statement comes from the "
    "node's `reconcile` or from a person. A request that the server refused, or that never reached it, did not happen. A new execution "
    "is a new effect.",
}


@dataclass(frozen=True)
class Held:
    """One test that names a guarantee: its file, its name, and what its docstring says."""

    path: str
    name: str
    says: str


def held() -> dict[int, list[Held]]:
    """The tests by the number that their docstring names."""
    found: dict[int, list[Held]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith(
                "test"
            ):
                continue
            says = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            for number in re.findall(r"\bG(\d+)\b", says):
                words = re.sub(r"^(?:G\d+(?:,? and |, )?)+[.:,;]? *", "", says)
                words = (
                    words[:1].upper() + words[1:]
                    if words
                    else node.name.removeprefix("test_").replace("_", " ")
                )
                found[int(number)].append(Held(path.relative_to(ROOT).as_posix(), node.name, words))
    return found


#: The tests that the page shows, by name; a name that is gone is skipped.
EXAMPLES: dict[int, tuple[str, ...]] = {
    1: (
        "test_a_function_sees_only_valid_input",
        "test_broken_output_stops_at_its_boundary",
        "test_input_is_of_the_inputs_class",
        "test_a_state_changed_between_nodes_is_validated_again",
        "test_a_violation_is_caught_at_its_step",
    ),
    2: (
        "test_a_classifier_that_raises_is_skipped",
        "test_an_exception_that_raises_anything_is_a_failure",
        "test_exceptions_whose_attributes_raise",
        "test_chains_that_bite_their_tail_come_to_an_end",
    ),
    3: (
        "test_retry_arithmetic",
        "test_the_delay_is_at_least_what_the_server_says",
        "test_a_server_that_asks_for_too_long_stops_the_run",
        "test_a_terminal_failure_is_not_retried",
    ),
    4: (
        "test_a_node_that_is_cancelled_after_its_last_await_keeps_its_output",
        "test_cancelled_anywhere_then_resumed",
        "test_a_child_that_refuses_to_be_cancelled_is_kept",
    ),
    5: (
        "test_killed_at_random",
        "test_resume_goes_on_where_the_run_stopped",
        "test_a_simple_store_is_tried_again",
        "test_steps_in_parts_of_groups_are_found_again",
        "test_killed_programs_end_as_undisturbed_ones",
        "test_workers_finish_the_graphs_of_killed_ones",
    ),
    6: (
        "test_tokens_of_failed_attempts_count",
        "test_usage_counts_across_resumes",
        "test_a_limit_that_cannot_be_counted_stops_the_run",
        "test_the_budget_stops_the_program_to_the_token",
    ),
    7: (
        "test_later_changes_do_not_rewrite_history",
        "test_every_attempt_of_a_mutating_step_is_traced_as_it_was_given",
        "test_a_trace_that_was_looked_at_is_still_the_runs_own",
    ),
    8: (
        "test_hooks_change_nothing",
        "test_an_exception_in_a_hook_changes_nothing",
        "test_a_hanging_hook_is_abandoned",
        "test_a_hook_cannot_keep_a_run_from_being_cancelled",
    ),
    9: (
        "test_hooks_are_ordered_nested_and_paired",
        "test_every_start_has_one_end",
        "test_every_start_of_a_run_that_is_broken_off_has_one_end",
        "test_a_sync_end_leaves_the_other_sets_their_ends",
    ),
    10: (
        "test_a_run_has_one_owner",
        "test_five_processes_at_once",
        "test_a_stopped_process_loses_its_run",
        "test_an_owner_that_is_taken_over_from_stops",
        "test_operators_of_one_run",
    ),
    11: (
        "test_names_of_classes_import_nothing",
        "test_answered_in_another_process",
        "test_no_module_of_ours_can_execute_data",
        "test_a_schema_reference_imports_nothing",
    ),
    12: (
        "test_no_timers_without_limits",
        "test_cost_per_node_does_not_grow",
        "test_no_overhead_when_unused",
        "test_no_run_waits_for_the_collector",
    ),
    13: (
        "test_a_process_that_dies_around_the_call",
        "test_a_call_that_may_have_happened_is_not_repeated",
        "test_killed_at_each_record",
        "test_a_script_that_starts_again_charges_once",
        "test_a_process_that_is_stopped_after_the_intent",
    ),
}


def chosen(number: int, tests: list[Held]) -> list[Held]:
    """Return the examples of a guarantee, in the order of their list."""
    by_name = {test.name: test for test in reversed(tests)}
    return [by_name[name] for name in EXAMPLES[number] if name in by_name]


def guarantees_page() -> str:
    tests = held()
    lines = [
        "<!-- Written by docs/generate.py: run `./dev run python docs/generate.py` after a change. -->",
        "",
        "# Guarantees",
        "",
        "This page is for anyone who relies on Stroma. It lists the guarantees, with their limits and some of",
        "their tests. Most tests run on every store. [Crash tests](crash-tests.md) has the results of",
        "thousands of runs with `kill -9`, power cuts, full disks and lost connections.",
        "",
        "A guarantee holds for one *execution* of a run. Across processes, G4, G5, G6, G10 and G13 need a",
        "[journal store](stores/index.md): SQLite, Postgres or Redis. A store of the simple `save`, `load`,",
        "`delete` protocol does not provide them.",
    ]
    for number, sentence in SENTENCES.items():
        lines += ["", f"## G{number}", "", f"**{sentence}**", "", MEANS[number], ""]
        lines += [f"Some of its tests (`git grep -w G{number} tests` lists all):", ""]
        lines += [
            f"- [{escaped(test.says)}](../{test.path}#{test.name})" for test in chosen(number, tests[number])
        ]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Words as the text of a link."""
    return re.sub(r"(`[^`]*`)|([\[\]<>*_|])", lambda part: part[1] or f"\\{part[2]}", text).rstrip(".")
