"""Generated text with structure: JSON documents, tables, arithmetic with right answers.

File number ``i`` of seed ``s`` is always the same text: every draw comes from one generator
seeded by the two.
"""

import json
import random

FIRST_NAMES = (
    "Ada Alan Barbara Carl Dana Edith Emil Frances Grace Hugo Ines Ivan Jean John Karen Linus Mary "
    "Nina Omar Paul Rosa Sofia Tim Vera"
).split()
LAST_NAMES = (
    "Adams Baker Brown Clark Evans Fischer Garcia Hopper Ito Jones Keller Lopez Meyer Novak Olsen "
    "Patel Rossi Silva Turing Weber Young"
).split()
CITIES = (
    "Athens Berlin Cairo Delhi Geneva Helsinki Lima London Madrid Nairobi Oslo Paris Prague Rome "
    "Sydney Tokyo Vienna Warsaw Zurich"
).split()
COLOURS = "red green blue black white yellow orange purple grey brown".split()
ITEMS = (
    "apple bread chair desk eraser flour glass hammer ink jar kettle lamp mirror notebook orange "
    "paper ruler spoon table umbrella vase"
).split()
STATES = "active blocked closed done failed new open pending ready running".split()
UNITS = "box each kg litre metre pack".split()


def structured_file(seed: int, index: int) -> str:
    """Generated file number ``index``: four to eight sections of one kind of text."""
    rng = random.Random(f"{seed}/{index}")  # a string seeds through SHA-512, alike everywhere
    kind = rng.choice(
        (json_object, json_records, json_config, table, table, arithmetic, arithmetic)
    )
    return "\n\n".join(kind(rng) for _ in range(rng.randint(4, 8))) + "\n"


def person(rng: random.Random) -> dict:
    """A person with an address and tags."""
    first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    return {
        "name": f"{first} {last}",
        "email": f"{first}.{last}@example.com".lower(),
        "age": rng.randint(18, 90),
        "city": rng.choice(CITIES),
        "active": rng.random() < 0.7,
        "tags": rng.sample(COLOURS, rng.randint(0, 3)),
    }


def product(rng: random.Random, number: int) -> dict:
    """A product whose total is its price times its quantity."""
    price, quantity = rng.randint(1, 99), rng.randint(1, 12)
    return {
        "id": number,
        "item": rng.choice(ITEMS),
        "colour": rng.choice(COLOURS),
        "unit": rng.choice(UNITS),
        "price": price,
        "quantity": quantity,
        "total": price * quantity,
        "state": rng.choice(STATES),
    }


def json_object(rng: random.Random) -> str:
    """One person, or one order with its lines, as indented JSON."""
    if rng.random() < 0.5:
        return json.dumps(person(rng), indent=2)
    start = rng.randint(1, 900)
    lines = [product(rng, start + i) for i in range(rng.randint(1, 3))]
    order = {"order": start, "customer": person(rng)["name"], "lines": lines}
    return json.dumps(order | {"total": sum(line["total"] for line in lines)}, indent=2)


def json_records(rng: random.Random) -> str:
    """One compact JSON object a line, as log files hold them."""
    start, people = rng.randint(1, 900), rng.random() < 0.5
    rows = range(start, start + rng.randint(4, 8))
    return "\n".join(json.dumps(person(rng) if people else product(rng, i)) for i in rows)


def json_config(rng: random.Random) -> str:
    """A nested configuration document."""
    name = rng.choice(ITEMS)
    document = {
        "name": f"{name}-{rng.choice(COLOURS)}",
        "version": f"{rng.randint(0, 3)}.{rng.randint(0, 12)}.{rng.randint(0, 9)}",
        "enabled": rng.random() < 0.5,
        "server": {
            "host": f"{rng.choice(CITIES).lower()}.example.com",
            "port": rng.choice((80, 443, 5432, 8000, 8080)),
            "retries": rng.randint(0, 5),
            "timeout": rng.choice((1, 5, 10, 30, 60)),
        },
        "paths": [f"/srv/{name}/{part}" for part in rng.sample(("data", "log", "tmp", "www"), 2)],
        "limits": {
            "min": (low := rng.randint(0, 9)),
            "max": low + rng.randint(1, 90),
            "default": low,
        },
        "owner": None if rng.random() < 0.3 else rng.choice(FIRST_NAMES).lower(),
    }
    keys = rng.sample(sorted(document), rng.randint(3, len(document)))
    return json.dumps({key: document[key] for key in document if key in keys}, indent=4)


def table(rng: random.Random) -> str:
    """A table of products or people: aligned columns, CSV or Markdown, with a total."""
    start = rng.randint(1, 900)
    count = rng.randint(4, 9)
    if rng.random() < 0.6:
        columns = ["id", "item", *rng.sample(("colour", "unit", "state"), rng.randint(0, 2))]
        columns += ["price", "quantity", "total"]
        records = [product(rng, start + i) for i in range(count)]
        footer = {"id": "sum", "total": sum(r["total"] for r in records)}
    else:
        columns = ["name", *rng.sample(("age", "city", "email"), rng.randint(2, 3))]
        records, footer = [person(rng) for _ in range(count)], None
    rows = [[str(record[c]) for c in columns] for record in records]
    if footer and rng.random() < 0.5:
        rows.append([str(footer.get(c, "")) for c in columns])
    return rng.choice((aligned_table, csv_table, markdown_table))(columns, rows)


def column_widths(columns: list[str], rows: list[list[str]]) -> list[int]:
    """Width of the widest cell of each column."""
    return [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]


def aligned_table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns two spaces apart, numbers to the right."""
    widths = column_widths(columns, rows)
    numeric = [rows[0][i].isdigit() for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, rows)])


def csv_table(columns: list[str], rows: list[list[str]]) -> str:
    """Comma-separated values; no cell holds a comma."""
    return "\n".join(",".join(cells) for cells in [columns, *rows])


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it also reads as text."""
    widths = column_widths(columns, rows)

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, rows)])


def arithmetic(rng: random.Random) -> str:
    """Lines of one kind of exercise, every answer right."""
    kind = rng.choice(("add", "multiply", "chain", "divide", "sequence", "sums", "compare"))
    return "\n".join(exercise(rng, kind) for _ in range(rng.randint(6, 12)))


def exercise(rng: random.Random, kind: str) -> str:
    """One solved exercise."""
    a, b, c = rng.randint(1, 99), rng.randint(1, 99), rng.randint(1, 12)
    if kind == "add":
        return f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a + b} - {b} = {a}"
    if kind == "multiply":
        return f"{a % 13} * {c} = {a % 13 * c}"
    if kind == "chain":
        return f"({a} + {b}) * {c} = {a + b} * {c} = {(a + b) * c}"
    if kind == "divide":
        return f"{a * c} / {c} = {a}, {a * c + c - 1} mod {c} = {c - 1}"
    if kind == "sequence":
        return ", ".join(str(a + c * i) for i in range(8))
    if kind == "compare":
        return (
            f"{a} {'<' if a < b else '>' if a > b else '='} {b}, max {max(a, b)}, min {min(a, b)}"
        )
    values = [rng.randint(1, 20) for _ in range(rng.randint(3, 6))]
    return f"sum({', '.join(map(str, values))}) = {sum(values)}"
