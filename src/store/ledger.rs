//! Which counters the units of a process's orders are in.

/// The table with the counters of the units that a process sells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ledger {
    /// `sku`: a single node has all units.
    Sku,
    /// `stock_share`: one of several nodes; each has a row of its own for each SKU.
    Share,
}

impl Ledger {
    /// Writes out a statement that moves counters, for the ledger of a process.
    ///
    /// | in the statement | `sku` | the share of node 3 |
    /// |---|---|---|
    /// | `@ledger` | `sku` | `stock_share` |
    /// | `@id` | `id` | `sku` |
    /// | `@total` | `total` | `lent` |
    /// | `@own` | nothing | ` AND node = 3` |
    /// | `@column`, in the list of columns of `stock_log` | nothing | `node, ` |
    /// | `@node`, its value | nothing | `3, ` |
    pub fn sql(self, node: i16, statement: &str) -> String {
        let (ledger, id, total, own, column, value) = match self {
            Ledger::Sku => ("sku", "id", "total", String::new(), "", String::new()),
            Ledger::Share => (
                "stock_share",
                "sku",
                "lent",
                format!(" AND node = {node}"),
                "node, ",
                format!("{node}, "),
            ),
        };
        statement
            .replace("@ledger", ledger)
            .replace("@id", id)
            .replace("@total", total)
            .replace("@own", &own)
            .replace("@column", column)
            .replace("@node", &value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_node_gets_the_statement_without_a_trace_of_nodes() {
        let statement = "UPDATE @ledger SET @total = 1 WHERE @id = $1@own; INSERT INTO log (sku, @columnat) SELECT 1, @node2";
        assert_eq!(
            Ledger::Sku.sql(3, statement),
            "UPDATE sku SET total = 1 WHERE id = $1; INSERT INTO log (sku, at) SELECT 1, 2"
        );
        assert_eq!(
            Ledger::Share.sql(3, statement),
            "UPDATE stock_share SET lent = 1 WHERE sku = $1 AND node = 3; INSERT INTO log (sku, node, at) SELECT 1, 3, 2"
        );
    }
}
