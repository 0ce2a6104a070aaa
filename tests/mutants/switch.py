"""Every mutant of cargo-mutants in one build, each behind a switch (mutant schemata, Untch 1993).

The list is cargo-mutants' own. Here a source file with all of its mutants is written at once; `mutant(N)` is true in a process whose
environment chooses N. What a switch cannot express (constants, `const fn`) is returned, so that it is counted as not tried.
"""

import collections
import re

import tree_sitter
import tree_sitter_rust

PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_rust.language()))

RUNTIME = r"""
//! Which mutant this process has, and which ones it has come by.
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

const UNREAD: u32 = u32::MAX;
const RECORD: u32 = u32::MAX - 1;
static CHOSEN: AtomicU32 = AtomicU32::new(UNREAD);
static SEEN: [AtomicBool; 65536] = [const { AtomicBool::new(false) }; 65536];

/// Whether mutant `n` is alive here.
#[inline]
pub fn mutant(n: u32) -> bool {
    match CHOSEN.load(Relaxed) {
        UNREAD | RECORD => slow(n),
        chosen => chosen == n,
    }
}

#[cold]
fn slow(n: u32) -> bool {
    if SEEN[n as usize].load(Relaxed) {
        return false;
    }
    let variable = |name| std::env::var(name).ok();
    let Some(file) = variable("MUTANTS_REACHED") else {
        let chosen = variable("MUTANT").map_or(0, |n| n.parse().unwrap());
        CHOSEN.store(chosen, Relaxed);
        return chosen == n;
    };
    CHOSEN.store(RECORD, Relaxed);
    if !SEEN[n as usize].swap(true, Relaxed) {
        let mut file = std::fs::File::options().create(true).append(true).open(file).unwrap();
        file.write_all(format!("{n}\n").as_bytes()).unwrap();
    }
    false
}
"""


def on(n):
    return f"crate::mutant::mutant({n})"


def mark(ids, text):
    """Marks what belongs to these mutants, so that an error of the compiler leads back to them."""
    return f"/*<{','.join(map(str, ids))}*/{text}/*>*/"


class File:
    """A source file and the mutants that it can hold behind switches."""

    def __init__(self, source, mutants):
        self.source = source
        lines = [0]
        for line in source.split(b"\n"):
            lines.append(lines[-1] + len(line) + 1)
        self.edits = collections.defaultdict(list)
        self.left = {}
        self.modifiers = set()
        root = PARSER.parse(source).root_node
        self.root = root
        for n, mutant in mutants.items():
            span = mutant["span"]
            at = []
            for end in (span["start"], span["end"]):
                line = source[lines[end["line"] - 1]:lines[end["line"]]].decode()
                at.append(lines[end["line"] - 1] + len(line[: end["column"] - 1].encode()))
            node = root.descendant_for_byte_range(*at)
            place = getattr(self, mutant["genre"])(node, *at)
            if node.parent and node.parent.type == "let_chain" and mutant["replacement"] == "||":
                self.left[n] = "refused: || beside let"
            elif place is None or self.is_constant(place):
                self.left[n] = "no switch" if place is None else "constant"
            else:
                self.edits[place.id].append((n, mutant["genre"], mutant["replacement"]))
                self.no_longer_constant(place)

    @staticmethod
    def is_constant(node):
        while node:
            if node.type in ("const_item", "static_item", "array_type", "enum_variant", "const_block"):
                return True
            node = node.parent
        return False

    def no_longer_constant(self, node):
        """A switch is read when the program runs, so a function with one is no `const fn`."""
        function = self.up(node, ("function_item",))
        for child in function.children if function else ():
            if child.type == "function_modifiers":
                self.modifiers.add(child.id)

    @staticmethod
    def up(node, kinds):
        while node and node.type not in kinds:
            node = node.parent
        return node

    def BinaryOperator(self, node, start, end):
        place = node if node.type in ("binary_expression", "compound_assignment_expr") else node.parent
        if place is None or place.type not in ("binary_expression", "compound_assignment_expr"):
            return None
        operator = place.child_by_field_name("operator")
        if (operator.start_byte, operator.end_byte) != (start, end):
            return None
        sides = [place.child_by_field_name("left"), place.child_by_field_name("right")]
        if any(side.type in ("let_condition", "let_chain") for side in sides):
            return None
        return place

    def UnaryOperator(self, node, start, end):
        place = node if node.type == "unary_expression" else node.parent
        return place if place and place.type == "unary_expression" and place.start_byte == start else None

    def MatchArm(self, node, start, end):
        arm = self.up(node, ("match_arm",))
        pattern = arm and arm.child_by_field_name("pattern")
        return pattern if pattern and self.has_plain_guard(pattern) else None

    def MatchArmGuard(self, node, start, end):
        pattern = self.up(node, ("match_pattern",))
        return pattern if pattern and self.has_plain_guard(pattern) else None

    @staticmethod
    def has_plain_guard(pattern):
        guard = pattern.child_by_field_name("condition")
        return guard is None or guard.type not in ("let_condition", "let_chain")

    def FnValue(self, node, start, end):
        function = self.up(node, ("function_item",))
        returned = function and function.child_by_field_name("return_type")
        # One opaque type is one type: another iterator cannot be returned beside it.
        if function is None or returned and returned.text.startswith(b"impl "):
            return None
        return function.child_by_field_name("body")

    def StructField(self, node, start, end):
        return None

    def render(self, without):
        """The file's text with all of its mutants but those in `without`."""
        return self.text(self.root, without)

    def text(self, node, without):
        if node.id in self.modifiers:
            return " ".join(word for word in node.text.decode().split() if word != "const")
        edits = [edit for edit in self.edits.get(node.id, ()) if edit[0] not in without]
        if edits:
            return getattr(self, "edit_" + node.type)(node, edits, without)
        return self.plain(node, without)

    def plain(self, node, without):
        parts, at = [], node.start_byte
        if node is self.root:
            at = 0
        for child in node.children:
            parts += [self.source[at:child.start_byte].decode(), self.text(child, without)]
            at = child.end_byte
        end = len(self.source) if node is self.root else node.end_byte
        return "".join(parts) + self.source[at:end].decode()

    def edit_block(self, node, edits, without):
        inside = self.plain(node, without)
        values = (mark([n], f"if {on(n)} {{ return {value}; }} ") for n, _, value in edits)
        return "{ " + "".join(values) + inside[1:]

    def edit_match_pattern(self, node, edits, without):
        guard = node.child_by_field_name("condition")
        ids = [n for n, _, _ in edits]
        keep = [f"!{on(n)}" for n, genre, value in edits if genre == "MatchArm" or value == "false"]
        always = [on(n) for n, genre, value in edits if genre == "MatchArmGuard" and value == "true"]
        if guard is None:
            return mark(ids, f"{self.plain(node, without)} if {' && '.join(keep)}")
        pattern = self.source[node.start_byte:guard.start_byte].decode()
        terms = keep + [f"({' || '.join(always + ['(' + self.text(guard, without) + ')'])})"]
        return mark(ids, pattern + " && ".join(terms))

    def edit_unary_expression(self, node, edits, without):
        ((n, _, _),) = edits
        operator = node.children[0].text.decode()
        operand = self.text(node.children[-1], without)
        return mark([n], f"(match ({operand}) {{ __v => if {on(n)} {{ __v }} else {{ {operator}__v }} }})")

    def edit_compound_assignment_expr(self, node, edits, without):
        left, operator, right = (node.child_by_field_name(name) for name in ("left", "operator", "right"))
        place, value = self.text(left, without), self.text(right, without)
        branches = "".join(
            f"if {on(n)} {{ {mark([n], f'{place} {other} __r')}; }} else " for n, _, other in edits
        )
        ids = [n for n, _, _ in edits]
        return mark(ids, f"{{ let __r = {value}; {branches}{{ {place} {operator.text.decode()} __r; }} }}")

    def edit_binary_expression(self, node, edits, without):
        left, operator, right = (node.child_by_field_name(name) for name in ("left", "operator", "right"))
        l, op, r = self.text(left, without), operator.text.decode(), self.text(right, without)
        ids = [n for n, _, _ in edits]
        if op in ("&&", "||"):
            # By De Morgan, and so without a second copy of either side.
            m = on(ids[0])
            return mark(ids, f"(((({l}) != {m}) {op} (({r}) != {m})) != {m})")
        if op in ("==", "!="):
            return mark(ids, f"((({l}) {op} ({r})) != {on(ids[0])})")
        by_reference = op in ("<", ">", "<=", ">=")
        pair = f"(&({l}), &({r}))" if by_reference else f"(({l}), ({r}))"
        branches = "".join(f"if {on(n)} {{ {mark([n], f'__l {other} __r')} }} else " for n, _, other in edits)
        return mark(ids, f"(match {pair} {{ (__l, __r) => {branches}{{ __l {op} __r }} }})")


MARK = re.compile(rb"/\*<([\d,]+)\*/|/\*>\*/")


def blamed(text, start, end):
    """The mutants that an error of the compiler between these bytes is due to: the innermost around it, else all inside."""
    stack, inside = [], []
    around = None
    for match in MARK.finditer(text):
        if around is None and match.start() >= start:
            around = list(stack)
        if match.start() >= end:
            break
        if match.group(1):
            ids = [int(n) for n in match.group(1).split(b",")]
            stack.append(ids)
            if match.start() >= start:
                inside += ids
        else:
            stack.pop()
    if around is None:
        around = list(stack)
    return around[-1] if around else inside
