//! Makes `openapi.json`, which the control plane serves, from `src/http/openapi.yaml`. Here, so that a fault in the
//! document fails the build, and the program has no YAML parser.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

const YAML: &str = "src/http/openapi.yaml";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={YAML}");
    let document: serde_json::Value = serde_saphyr::from_str(&fs::read_to_string(YAML)?)?;
    let json = Path::new(&env::var("OUT_DIR")?).join("openapi.json");
    fs::write(json, format!("{document:#}\n"))?;
    Ok(())
}
