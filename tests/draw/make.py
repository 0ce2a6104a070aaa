#!/usr/bin/env python3
"""Makes the vectors of tests/draw: published draws, written by other means than Millrace's code.

    tests/draw/make.py        writes inputs.json, *.ndjson beside itself

It needs Python 3 and openssl, which computes every rank a second time. The inputs are fixed, so the files
stay the same; the test compares them with those that Millrace writes.
"""

import hashlib
import hmac
import json
import pathlib
import subprocess

HERE = pathlib.Path(__file__).parent


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def mac(key, text):
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def openssl_mac(key, text):
    command = ["openssl", "dgst", "-sha256", "-mac", "HMAC", "-macopt", "hexkey:" + key.hex()]
    out = subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    return out.decode().split()[-1]


def common(one, other):
    count = 0
    while count < len(one) and one[count] == other[count]:
        count += 1
    return count


def draw(name, seed, salt, beacon_name, beacon, units, entrants):
    rows = []
    openings = []
    for user, quantity in entrants:
        token = mac(salt, user)[:32]
        rank = mac(seed, (beacon or "") + user)
        assert rank == openssl_mac(seed, (beacon or "") + user)
        entry = sha256((token + user).encode())
        rows.append({"rank": rank, "entry": entry, "quantity": quantity})
        openings.append({"user_id": user, "entry_token": token})
    listed = "".join(sorted(f"{row['entry']} {row['quantity']}\n" for row in rows))
    rows.sort(key=lambda row: row["rank"])
    terms = {
        "draw": "millrace-draw-1",
        "sku_id": "IPHONE-15",
        "state": "entries_open",
        "draw_at": "2026-12-01T12:00:00.000Z",
        "draw_beacon": beacon_name,
        "commitment": sha256(seed),
        "fixed_at": None,
        "units": None,
        "entries": None,
        "entries_hash": None,
        "beacon": None,
        "seed": None,
    }
    fixed = terms | {
        "state": "entries_fixed",
        "fixed_at": "2026-12-01T12:00:01.250Z",
        "units": units,
        "entries": len(rows),
        "entries_hash": sha256(listed.encode()),
    }
    drawn = fixed | {"state": "drawn", "beacon": beacon, "seed": seed.hex()}
    lines = [drawn]
    left = units
    for place, row in enumerate(rows):
        neighbours = rows[max(place - 1, 0) : place] + rows[place + 1 : place + 2]
        digits = 1 + max((common(row["rank"], other["rank"]) for other in neighbours), default=0)
        won = row["quantity"] <= left
        left -= row["quantity"] if won else 0
        lines.append(
            {
                "place": place + 1,
                "entry": row["entry"],
                "quantity": row["quantity"],
                "rank": row["rank"][:digits],
                "won": won,
            }
        )
    for suffix, content in (
        ("open", [terms]),
        ("fixed", [fixed]),
        ("drawn", lines),
        ("openings", openings),
    ):
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in content)
        (HERE / f"{name}-{suffix}.ndjson").write_text(text)
    return {
        "name": name,
        "seed": seed.hex(),
        "salt": salt.hex(),
        "beacon": beacon,
        "entrants": [{"user_id": user, "quantity": quantity} for user, quantity in entrants],
    }


def main():
    seed = bytes(range(32))
    salt = bytes(range(100, 132))
    many = [(f"u-{number}", 1 + number % 3) for number in range(60)]
    strange = ["!", "~" * 48, "a@b.example", '"quoted"', "back\\slash", "7", "41", "%s", "u-1", "u-10"]
    inputs = [
        draw("beacon", seed, salt, "drand round 4242, hexadecimal", "9f86d081884c7d65", 30, many),
        draw("alone", seed[::-1], salt[::-1], None, None, 4, [(user, 1) for user in strange]),
    ]
    (HERE / "inputs.json").write_text(json.dumps(inputs, indent=1) + "\n")


main()
