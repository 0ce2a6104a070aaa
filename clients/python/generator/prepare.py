"""Cuts the service's OpenAPI document down to the part that this client is for.

usage: prepare.py DOCUMENT > CUT

Of both planes' operations it keeps those that a shop's backend calls with JSON. Payment callbacks come from the payment
platforms, and a batch is NDJSON, for which the generator has no code. Two things are simplified on the way:

* Each error response narrows the members of `Problem` by `const`, which the generator cannot merge. A plain `Problem` says as
  much to a program that looks at `code`.
* A bearer token is optional at every operation. The generated calls should take either kind of its `Client`.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML

KEPT = {"placeOrder", "getOrder", "cancelOrder", "listOrders", "getSku"}
PROBLEM = {"$ref": "#/components/schemas/Problem"}


def references(node: Any) -> Iterator[str]:
    """The schemas that a part of the document names."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)


def response(document: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """A response without its headers, whose body, if it is an error's, is a plain `Problem`."""
    if "$ref" in answer:
        answer = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    content = {
        media: {"schema": PROBLEM if media == "application/problem+json" else body["schema"]}
        for media, body in answer["content"].items()
    }
    return {"description": answer["description"], "content": content}


def cut(document: dict[str, Any]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if not isinstance(operation, dict) or operation.get("operationId") not in KEPT:
                continue
            answers = {status: response(document, answer) for status, answer in operation["responses"].items()}
            kept = {name: part for name, part in operation.items() if name != "security"}
            paths.setdefault(path, {})[method] = {**kept, "responses": answers}
    found = {operation["operationId"] for methods in paths.values() for operation in methods.values()}
    if found != KEPT:
        raise SystemExit(f"prepare.py: the document has no operation {', '.join(sorted(KEPT - found))}")

    schemas, named = document["components"]["schemas"], set[str]()
    waiting = list(references(paths))
    while waiting:
        if (name := waiting.pop()) not in named:
            named.add(name)
            waiting += references(schemas[name])
    return {
        "openapi": document["openapi"],
        "info": {"title": "Millrace", "version": document["info"]["version"]},
        "paths": paths,
        "components": {"schemas": {name: schema for name, schema in schemas.items() if name in named}},
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        json.dump(cut(YAML(typ="safe", pure=True).load(file)), sys.stdout, indent=1)
