//! `cargo xtask vectors`: every line is answered, whatever it does to the process it runs in.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::Command;

use serde_json::{Value, json};

/// Instructions as hex.
const EXIT: &str = "9500000000000000";
const R0_IS_7: &str = "b700000007000000";
/// *(u64 *)(r1 + 0) = 0, with r1 the read-only context or 0.
const STORE: &str = "7a01000000000000";
const GOTO_ITSELF: &str = "0500ffff00000000";
const R1_IS_0: &str = "b701000000000000";

#[test]
fn crashes_and_endless_loops_are_answers() {
    let fine = json!({"id": 0, "insns": format!("{R0_IS_7}{EXIT}")});
    let crash =
        json!({"id": 1, "insns": format!("{R1_IS_0}{STORE}{R0_IS_7}{EXIT}"), "check": false});
    let endless = json!({"id": 2, "insns": format!("{GOTO_ITSELF}{EXIT}"), "check": false});
    let refused = json!({"id": 3, "insns": format!("{R1_IS_0}{STORE}{R0_IS_7}{EXIT}")});
    let lines = [&fine, &crash, &fine, &endless, &refused, &fine].map(Value::to_string);
    let file = std::env::temp_dir().join(format!("flea-vectors-{}.jsonl", std::process::id()));
    std::fs::write(&file, format!("{}\nno json\n\n", lines.join("\n"))).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["vectors", "--seconds", "2"])
        .arg(&file)
        .output()
        .unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter_map(|l| serde_json::from_slice(l).ok())
        .collect();
    assert_eq!(answers.len(), 7, "{answers:?}");
    let right = json!({"id": 0, "verdict": "accept", "message": "", "r0_interpreted": "0x7", "r0_compiled": "0x7"});
    for i in [0, 2, 5] {
        assert_eq!(answers[i], right);
    }
    let message = |i: usize| answers[i]["message"].as_str().unwrap().to_owned();
    for (i, id, verdict, part) in [
        (1, json!(1), "skipped", "signal: 11"),
        (3, json!(2), "skipped", "no end after 2 s"),
        (4, json!(3), "reject", "R1 invalid mem access 'scalar'"),
        (6, Value::Null, "skipped", "no vector"),
    ] {
        assert_eq!((&answers[i]["id"], &answers[i]["verdict"]), (&id, &json!(verdict)), "{i}");
        assert!(message(i).contains(part), "{}", message(i));
        assert!(answers[i]["r0_compiled"].is_null() && answers[i]["r0_interpreted"].is_null());
    }
}
