//! A configuration file and, behind a NUL, variables (`NAME=VALUE`, a line each), on any bytes: no panic, and what is
//! taken, written out as `millrace config show` does, is taken again as the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use millrace::config::Config;

fuzz_target!(|input: &[u8]| {
    let Ok(input) = std::str::from_utf8(input) else {
        return;
    };
    let (text, variables) = input.split_once('\0').unwrap_or((input, ""));
    let variables = variables
        .lines()
        .filter_map(|line| line.split_once('='))
        // Which file it is is up to the operator; here it could be any of this machine.
        .filter(|(name, _)| !name.to_ascii_uppercase().contains("_FILE"))
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    match Config::parse(text, "the target", variables) {
        Ok(config) => {
            let shown = config.to_toml();
            // Secrets are not shown, and the word in their place is none.
            if shown.contains("(hidden)") {
                return;
            }
            let again = Config::parse(&shown, "shown", []).expect("what was shown");
            assert_eq!(again.to_toml(), shown);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
