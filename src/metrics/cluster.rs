//! Metrics of a node of a cluster.

metrics! {
    /// This process as one of several nodes.
    pub struct Cluster {
        lanes_open = gauge("millrace_lanes_open"):
            "Lanes of buyers that are open here; 0 for a process that is no node of a cluster.";
        lanes_given = counter("millrace_lanes_handed_over_total"):
            "Lanes that this node has handed over to others.";
        takeovers = counter("millrace_takeovers_total"):
            "Nodes that were gone and that this node has fenced.";
        renewal_age_seconds = float_gauge("millrace_renewal_age_seconds"):
            "Time since the last committed renewal of this node's membership; 0 for a process that is no node.";
        clock_apart_seconds = float_gauge("millrace_clock_apart_seconds"):
            "How far this node's clock is from the database's at least, negative if it is behind; it goes on from that at the start. 0 for a process that is no node.";
    }
}
