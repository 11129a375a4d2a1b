//! redis-server under redis-benchmark: attached to while it serves.

use ::flea::{
    Session,
    builtin::{Count, Histograms},
};

use crate::{
    flea::{Attached, command, list},
    redis::{Client, Redis},
    text::{Text, has_flea, maps},
};

/// Functions of redis-server's own that every command goes through.
const OWN: [&str; 5] =
    ["processCommand", "lookupCommand", "call", "processInputBuffer", "dictFind"];

/// Makes sure that nothing of Flea's stays in process `pid`: code that a thread may still
/// return to is given back by the next flea that comes, once the thread has left it.
fn assert_leaves(text: &Text, pid: u32, client: &mut Client) {
    for _ in 0..20 {
        if !has_flea(pid) {
            break;
        }
        client.round();
        let output =
            command(&["count", "processCommand", "--duration", "0", "-p", &pid.to_string()])
                .output()
                .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    text.assert_untouched(pid);
}

#[test]
fn every_function_of_its_libc_is_counted_while_it_serves() {
    let Some(redis) = Redis::start() else { return };
    let Some(mut load) = redis.benchmark() else { return };
    let pid = redis.pid();
    let text = Text::of(pid);
    let mut client = redis.client();
    client.round();

    let listed = list("libc.so.6:*", &["-p", &pid.to_string()]);
    let attachable = listed.attachable();
    assert!(attachable.len() > 2000, "{} functions of libc", attachable.len());

    let flea = Attached::start(&["count", "libc.so.6:*"], pid);
    assert!(text != Text::of(pid), "attached, and the text is as before");
    for _ in 0..50 {
        client.round();
    }
    load.assert_undisturbed();
    let records = flea.stop();
    assert_eq!(records.attached("count"), attachable);
    records.assert_complete(attachable.len());
    let counts = records.counts();
    assert!(counts["epoll_wait"] > 0 && counts["read"] >= 200, "{counts:?}");

    client.round();
    load.assert_undisturbed();
    assert_leaves(&text, pid, &mut client);
}

#[test]
fn every_function_of_its_own_is_timed_while_it_serves() {
    let Some(redis) = Redis::start() else { return };
    let Some(mut load) = redis.benchmark() else { return };
    let pid = redis.pid();
    let text = Text::of(pid);
    let mut client = redis.client();

    let flea = Attached::start(&["latency", "*"], pid);
    for _ in 0..50 {
        client.round();
    }
    load.assert_undisturbed();
    let records = flea.stop();
    let timed = records.of_type("histogram").filter(|h| h["count"] != 0).count();
    assert!(timed > 50, "{timed} functions were called");
    client.round();
    load.assert_undisturbed();
    assert_leaves(&text, pid, &mut client);
}

#[test]
fn its_calls_are_counted_exactly_and_malloc_of_libc_as_well() {
    let Some(redis) = Redis::start() else { return };
    let pid = redis.pid();
    let text = Text::of(pid);
    let mut client = redis.client();
    client.round();

    let patterns = ["pingCommand", "setCommand", "getCommand", "delCommand", "libc.so.6:malloc"];
    let mut args = vec!["count"];
    args.extend(patterns);
    let flea = Attached::start(&args, pid);
    for _ in 0..300 {
        client.round();
    }
    let records = flea.stop();
    records.assert_complete(5);
    let counts = records.counts();
    for command in &patterns[..4] {
        assert_eq!(counts[command], 300, "{counts:?}");
    }
    assert!(counts.contains_key("malloc"));
    assert_leaves(&text, pid, &mut client);
}

/// What must not grow from round to round.
#[derive(Debug)]
struct Footprint {
    n_mappings: usize,
    vm_size_kib: u64,
    vm_rss_kib: u64,
}

impl Footprint {
    fn of(pid: u32) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            n_mappings: maps(pid).lines().count(),
            vm_size_kib: field("VmSize:"),
            vm_rss_kib: field("VmRSS:"),
        }
    }
}

#[test]
fn two_hundred_rounds_under_load_leave_nothing() {
    const ROUNDS: u32 = 200;
    const WARM: u32 = 20;
    let Some(redis) = Redis::start() else { return };
    let Some(mut load) = redis.benchmark() else { return };
    let pid = redis.pid();
    let text = Text::of(pid);
    let mut client = redis.client();
    client.round();

    let session = Session::attach(pid.cast_signed()).unwrap();
    let mut functions = session.find("libc.so.6:malloc").unwrap();
    for name in OWN {
        functions.extend(session.find(name).unwrap());
    }
    assert_eq!(functions.len(), 1 + OWN.len());
    let mut n_calls = 0;
    let mut warm = None;
    for round in 1..=ROUNDS {
        if round % 2 == 0 {
            let mut count = Count::start(&session, &functions).unwrap();
            assert_eq!(count.functions().len(), functions.len(), "{:?}", count.refused());
            client.round();
            count.detach().unwrap();
            n_calls += count.read().iter().sum::<u64>();
        } else {
            let mut times = Histograms::of_duration(&session, &functions).unwrap();
            assert_eq!(times.functions().len(), functions.len(), "{:?}", times.refused());
            client.round();
            times.detach().unwrap();
            n_calls += times.read().iter().map(|h| h.count).sum::<u64>();
        }
        client.round();
        load.assert_undisturbed();
        if round == WARM {
            warm = Some(Footprint::of(pid));
        }
    }
    let (warm, end) = (warm.unwrap(), Footprint::of(pid));
    // Every round has at least its own four commands to see, four functions each.
    assert!(n_calls >= u64::from(ROUNDS) * 16, "{n_calls} calls");
    // One round's memory may still be there for a thread to leave; not one per round.
    assert!(end.n_mappings <= warm.n_mappings + 4, "{warm:?} became {end:?}");
    assert!(end.vm_size_kib <= warm.vm_size_kib + (64 << 10), "{warm:?} became {end:?}");
    assert!(end.vm_rss_kib <= warm.vm_rss_kib + (4 << 10), "{warm:?} became {end:?}");
    eprintln!("{n_calls} calls in {ROUNDS} rounds; {warm:?} became {end:?}");
    drop(session);
    assert_leaves(&text, pid, &mut client);
}
