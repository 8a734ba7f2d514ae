"""The demo from start to end: write text, trace, measure every policy, verify, report."""

import argparse

from . import checkpoint, interrupt, measure, report, screen, session, trace, verify


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for, in the order the user sees; return the exit status."""
    device = session.pick_device(args.device)
    checkpoint.check_name(args.model)
    budget = session.memory_budget(args)
    tokenizer = checkpoint.load_tokenizer(args.model)
    prompts = session.encode(args.prompt, tokenizer)
    text = checkpoint.eval_text(args.model, tokenizer, args.eval_tokens)
    rows = checkpoint.pick_rows(text, args.eval_tokens)
    session.check_length(checkpoint.load_config(args.model), prompts, args.max_new_tokens)

    verdict = None
    model, moe = session.load(args, device, **budget)
    with moe:
        generations = write_texts(args, model, moe, tokenizer, prompts)
        if args.profile is not None:
            ids = prompts[0][1]
            path = trace.write_trace(
                args.profile, lambda: session.generate(model, tokenizer, ids, 8, args.seed)
            )
            print(f"wrote {path}; to look at it: tensorboard --logdir {args.profile}")
        lines = measure_policies(args.policy, model, moe, rows)
        where = report.conditions(args, model, moe, text)
        report.show_table(lines, where)
        if args.verify:
            twin, whole = session.load(args, device, resident=1.0)
            texts = [(f"prompt {prompt!r}", ids[0]) for prompt, ids in prompts] + rows
            with whole:
                verdict = check_exactness(model, moe, twin, texts)

    interrupt.check()
    if args.json is not None:
        content = {"conditions": where, "rows": lines, "generations": generations}
        report.write_json(args.json, content | ({"verify": verdict} if verdict else {}))
    return 0 if verdict is None or verdict["passed"] else 1


def write_texts(args, model, moe, tokenizer, prompts) -> list[dict]:
    """Continue every prompt before the user's eyes, under the policy that was named last."""
    moe.set_policy(measure.make_policy(*args.text_policy))
    policy, generations = measure.label(args.text_policy), []
    for number, (prompt, ids) in enumerate(prompts, start=1):
        title = f"prompt {number} of {len(prompts)}, under {policy}"
        with screen.Stream(tokenizer, title, prompt, args.max_new_tokens) as stream:
            session.generate(model, tokenizer, ids, args.max_new_tokens, args.seed, stream)
        print()
        generations.append({"prompt": prompt, "text": stream.written})
    return generations


def measure_policies(policies, model, moe, rows) -> list[dict]:
    """Measure the policies one after the other, each with a bar."""
    total = sum(len(row) - 1 for _, row in rows)
    lines = []
    with screen.progress() as bar:
        for policy in policies:
            task = bar.add_task(measure.label(policy), total=total)
            step = bar_step(bar, task)
            lines.append(measure.measure(model, moe, rows, policy, step))
    return measure.compare(lines)


def check_exactness(model, moe, twin, texts) -> dict:
    """Verify with a bar, and say what came out."""
    with screen.progress("histories") as bar:
        step = bar_step(bar, bar.add_task("verify", total=verify.HISTORIES))
        verdict = verify.verify(model, moe, twin, texts, step)
    print(f"verify: {verdict['sentence']}")
    return verdict


def bar_step(bar, task):
    """Return what advances a task by one, and notices Ctrl-C."""

    def step():
        interrupt.check()
        bar.advance(task)

    return step
