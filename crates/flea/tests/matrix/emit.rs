//! The source text of a build: functions that note what they receive, and callers. Start at
//! [`source_text`].

use std::fmt::Write as _;

use crate::generate::{Form, Function, Language, Mode, Param, Source};
use crate::rng::Rng;
use crate::types::Type;

/// Words that the caller of a local function keeps in registers.
pub const N_LIVE: usize = 13;
/// Doubles that it keeps.
pub const N_LIVE_DOUBLES: usize = 12;
/// What it knows them by: `live_word(i)` for all of them.
pub fn live_word(i: usize) -> u64 {
    0x4010_7765_6976_0000 + i as u64 * 0x0001_0001_0001
}

/// A place in the buffer of inputs or in the log.
pub type Offset = usize;

/// Where a function's values are in both buffers.
#[derive(Clone, Debug)]
pub struct Places {
    /// Inputs: a value per parameter, then per argument for `...`.
    pub inputs: Vec<Offset>,
    /// Input: what it returns.
    pub result: Offset,
    /// Log: what it received, in the order of `inputs`.
    pub received: Vec<Offset>,
    /// Log: addresses of parameters that come by address.
    pub addresses: Vec<Offset>,
    /// Log: `this`.
    pub this: Offset,
    /// Log: what its caller got.
    pub returned: Offset,
    /// Log: how often it was called.
    pub calls: Offset,
    /// Log: what the caller of a local function still has after the call.
    pub live: Offset,
}

/// Both buffers, laid out.
#[derive(Clone, Debug)]
pub struct Buffers {
    pub functions: Vec<Places>,
    pub n_input_bytes: usize,
    pub n_log_bytes: usize,
}

impl Buffers {
    /// A place for every value of every function.
    pub fn of(source: &Source) -> Self {
        let (mut input, mut log) = (0, 0);
        let functions = source.functions.iter().map(|f| places(f, &mut input, &mut log)).collect();
        Self { functions, n_input_bytes: input, n_log_bytes: log }
    }

    /// Random values for all inputs.
    pub fn inputs(&self, source: &Source, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = vec![0; self.n_input_bytes];
        for (function, places) in source.functions.iter().zip(&self.functions) {
            for (ty, &at) in passed(function).zip(&places.inputs) {
                bytes[at..at + ty.size].copy_from_slice(&ty.value(rng));
            }
            if let Some(ty) = &function.ret {
                let at = places.result;
                bytes[at..at + ty.size].copy_from_slice(&ty.value(rng));
            }
        }
        bytes
    }
}

/// The types of all that a call passes.
pub fn passed(function: &Function) -> impl Iterator<Item = &Type> {
    function.params.iter().map(|p| &p.ty).chain(&function.varargs)
}

fn places(function: &Function, input: &mut Offset, log: &mut Offset) -> Places {
    let take = |at: &mut Offset, n_bytes: usize| {
        let this = *at;
        *at = (*at + n_bytes).next_multiple_of(16);
        this
    };
    let result_bytes = function.ret.as_ref().map_or(0, |ty| ty.size);
    Places {
        inputs: passed(function).map(|ty| take(input, ty.size)).collect(),
        result: take(input, result_bytes),
        received: passed(function).map(|ty| take(log, ty.size)).collect(),
        addresses: function.params.iter().map(|_| take(log, 8)).collect(),
        this: take(log, 8),
        returned: take(log, result_bytes),
        calls: take(log, 8),
        live: take(log, 8 * (N_LIVE + N_LIVE_DOUBLES)),
    }
}

/// The whole source.
pub fn source_text(language: Language, source: &Source, buffers: &Buffers) -> String {
    let mut text = String::from(
        "/* Generated; see the matrix test. */\n\
         #define COPY(to, from, n) __builtin_memcpy((void *)(to), (const void *)(from), n)\n",
    );
    if language == Language::Cpp {
        text.push_str(
            "#define STATIC_ASSERT static_assert\n#define ALIGNOF alignof\n\
             static unsigned matrix_destroyed;\n\
             template <class F> static void *matrix_address(F f)\n\
             { void *p; COPY(&p, &f, sizeof p); return p; }\nextern \"C\" {\n",
        );
    } else {
        text.push_str("#define STATIC_ASSERT _Static_assert\n#define ALIGNOF _Alignof\n");
    }
    text.push_str(
        "extern unsigned char matrix_in[], matrix_log[];\n\
         extern unsigned long matrix_live[];\n",
    );
    if language == Language::Cpp {
        text.push_str("}\n");
    }
    for ty in &source.types {
        define(&mut text, ty);
    }
    if language == Language::Cpp {
        host(&mut text, source);
    }
    for (function, places) in source.functions.iter().zip(&buffers.functions) {
        if function.form != Form::Nested {
            let inner = if is_member(function) { "host::" } else { "" };
            let head = head(function, &format!("{inner}{}", function.name()));
            let local = if function.form == Form::Local { "static " } else { "" };
            let _ = writeln!(text, "{ATTRIBUTES} {local}{head} {{");
            body(&mut text, function, places);
            text.push_str("}\n");
        }
        caller(&mut text, language, function, places);
        thunk(&mut text, function);
    }
    tables(&mut text, language, source, buffers);
    text
}

/// One call is one run of the function's own code.
const ATTRIBUTES: &str = "__attribute__((noinline, noclone))";

fn is_member(function: &Function) -> bool {
    matches!(function.form, Form::Method | Form::StaticMethod)
}

fn define(text: &mut String, ty: &Type) {
    let Some(definition) = &ty.definition else { return };
    let Type { spelling, size, align, .. } = ty;
    let _ = writeln!(
        text,
        "{definition}\nSTATIC_ASSERT(sizeof({spelling}) == {size}, \"size\");\n\
         STATIC_ASSERT(ALIGNOF({spelling}) == {align}, \"alignment\");"
    );
}

/// `RET NAME(PARAMS)`
pub fn head(function: &Function, name: &str) -> String {
    let ret = function.ret.as_ref().map_or("void", |ty| &ty.spelling);
    let mut params: Vec<String> =
        function.params.iter().zip(0..).map(|(p, i)| format!("{} p{i}", p.spelling())).collect();
    match function.form {
        Form::Variadic => params.push("...".to_owned()),
        _ if params.is_empty() => params.push("void".to_owned()),
        _ => {}
    }
    format!("{ret} {name}({})", params.join(", "))
}

/// What the function does: it notes everything and returns the given result.
fn body(text: &mut String, function: &Function, places: &Places) {
    let _ = writeln!(text, "  ++*(unsigned long *)(matrix_log + {});", places.calls);
    if function.form == Form::Method {
        let _ =
            writeln!(text, "  {{ host *at = this; COPY(matrix_log + {}, &at, 8); }}", places.this);
    }
    for (i, param) in function.params.iter().enumerate() {
        if param.is_address() {
            let at = places.addresses[i];
            let _ =
                writeln!(text, "  {{ const void *at = &p{i}; COPY(matrix_log + {at}, &at, 8); }}");
        }
        // gcc gives a class without members a place on the stack where nothing was put.
        let at = places.received[i];
        if !param.ty.leaves.is_empty() {
            let _ = writeln!(text, "  COPY(matrix_log + {at}, &p{i}, {});", param.ty.size);
        }
    }
    if function.form == Form::Variadic {
        let _ = writeln!(
            text,
            "  __builtin_va_list rest; __builtin_va_start(rest, p{});",
            function.params.len() - 1
        );
        for (ty, at) in function.varargs.iter().zip(&places.received[function.params.len()..]) {
            let Type { spelling, size, .. } = ty;
            let _ = writeln!(
                text,
                "  {{ {spelling} v = __builtin_va_arg(rest, {spelling}); \
                 COPY(matrix_log + {at}, &v, {size}); }}"
            );
        }
        text.push_str("  __builtin_va_end(rest);\n");
    }
    if function.form == Form::Nested {
        let _ = writeln!(text, "  COPY(matrix_log + {}, &outer, sizeof outer);", places.live);
    }
    if let Some(ty) = &function.ret {
        let Type { spelling, size, .. } = ty;
        let at = places.result;
        let _ = writeln!(text, "  {spelling} r; COPY(&r, matrix_in + {at}, {size}); return r;");
    }
}

fn caller(text: &mut String, language: Language, function: &Function, places: &Places) {
    let index = function.index;
    if function.form.has_thunk() && !is_member(function) {
        let linkage = if language == Language::Cpp { "extern \"C\" " } else { "" };
        let _ = writeln!(text, "{linkage}{};", head(function, &format!("thunk_{index:03}")));
    }
    let _ = writeln!(text, "static void call_{index:03}(void) {{");
    if function.form == Form::Nested {
        let _ = writeln!(
            text,
            "  unsigned long outer[{N_LIVE}]; COPY(outer, matrix_live, sizeof outer);\n  \
             auto {} {ATTRIBUTES};\n  {} {{",
            head(function, &function.name()),
            head(function, &function.name()),
        );
        body(text, function, places);
        text.push_str("  }\n");
    }
    for ((ty, at), i) in passed(function).zip(&places.inputs).zip(0..) {
        let Type { spelling, size, .. } = ty;
        let _ = writeln!(text, "  {spelling} a{i}; COPY(&a{i}, matrix_in + {at}, {size});");
    }
    let is_local = function.form == Form::Local;
    if is_local {
        take_live(text);
    }
    let callee = match function.form {
        Form::Local | Form::Nested => function.name(),
        Form::Method => format!("matrix_host.thunk_{index:03}"),
        Form::StaticMethod => format!("host::thunk_{index:03}"),
        Form::Global | Form::Variadic => format!("thunk_{index:03}"),
    };
    let arguments: Vec<String> =
        (0..).zip(passed(function)).map(|(i, _)| argument(function.params.get(i), i)).collect();
    let call = format!("{callee}({})", arguments.join(", "));
    match &function.ret {
        Some(Type { spelling, .. }) => {
            let _ = writeln!(text, "  {spelling} r = {call};");
        }
        None => {
            let _ = writeln!(text, "  {call};");
        }
    }
    if is_local {
        give_live(text, places.live);
    }
    if let Some(ty) = &function.ret {
        let _ = writeln!(text, "  COPY(matrix_log + {}, &r, {});", places.returned, ty.size);
    }
    text.push_str("}\n");
}

fn argument(param: Option<&Param>, i: usize) -> String {
    match param {
        Some(Param { mode: Mode::RvalueReference, ty }) => {
            format!("static_cast<{} &&>(a{i})", ty.spelling)
        }
        _ => format!("a{i}"),
    }
}

/// Values in registers, as far as there are any, that nobody could make again.
fn take_live(text: &mut String) {
    for i in 0..N_LIVE {
        let _ = writeln!(text, "  unsigned long x{i} = matrix_live[{i}];");
    }
    for i in 0..N_LIVE_DOUBLES {
        let _ = writeln!(text, "  double d{i}; COPY(&d{i}, matrix_live + {}, 8);", N_LIVE + i);
    }
    opaque(text);
}

fn give_live(text: &mut String, at: Offset) {
    opaque(text);
    for i in 0..N_LIVE {
        let _ = writeln!(text, "  COPY(matrix_log + {}, &x{i}, 8);", at + 8 * i);
    }
    for i in 0..N_LIVE_DOUBLES {
        let _ = writeln!(text, "  COPY(matrix_log + {}, &d{i}, 8);", at + 8 * (N_LIVE + i));
    }
}

fn opaque(text: &mut String) {
    for i in 0..N_LIVE {
        let _ = writeln!(text, "  __asm__ volatile(\"\" : \"+r\"(x{i}));");
    }
    for i in 0..N_LIVE_DOUBLES {
        let _ = writeln!(text, "  __asm__ volatile(\"\" : \"+x\"(d{i}));");
    }
}

/// Stands between caller and function: what is on the stack stays where the function expects
/// it, because the return address is taken off before the function is called.
fn thunk(text: &mut String, function: &Function) {
    if !function.form.has_thunk() {
        return;
    }
    let index = function.index;
    let _ = writeln!(
        text,
        "__asm__(\".pushsection .text\\n.globl thunk_{index:03}\\n\
         .type thunk_{index:03}, @function\\nthunk_{index:03}:\\n\
         popq matrix_cpu+384(%rip)\\nmovq ${index}, matrix_cpu+408(%rip)\\n\
         jmp matrix_enter\\n.size thunk_{index:03}, .-thunk_{index:03}\\n.popsection\");"
    );
}

/// The class whose members are traced.
fn host(text: &mut String, source: &Source) {
    text.push_str("struct host {\n  long tag;\n");
    for function in source.functions.iter().filter(|f| is_member(f)) {
        let fixed = if function.form == Form::StaticMethod { "static " } else { "" };
        let thunk = format!("thunk_{:03}", function.index);
        let _ = writeln!(
            text,
            "  {fixed}{};\n  {fixed}{} __asm__(\"{thunk}\");",
            head(function, &function.name()),
            head(function, &thunk),
        );
    }
    text.push_str("};\nstatic host matrix_host;\n");
}

fn tables(text: &mut String, language: Language, source: &Source, buffers: &Buffers) {
    if language == Language::Cpp {
        text.push_str("extern \"C\" {\n");
    }
    let target = |function: &Function| match function.form {
        // Nobody may know the address of a local function, or it is not local.
        Form::Local | Form::Nested => "0".to_owned(),
        Form::Method | Form::StaticMethod => format!("matrix_address(&host::{})", function.name()),
        _ if language == Language::Cpp => format!("matrix_address({})", function.name()),
        _ => format!("(void *){}", function.name()),
    };
    let list = |item: &dyn Fn(&Function) -> String| -> String {
        source.functions.iter().map(|f| item(f) + ", ").collect()
    };
    let _ = writeln!(
        text,
        "void *matrix_target[] = {{ {} }};\nvoid (*matrix_call[])(void) = {{ {} }};\n\
         unsigned long matrix_n = {};\nunsigned char matrix_in[{}], matrix_log[{}];\n\
         unsigned long matrix_n_in = {}, matrix_n_log = {};",
        list(&target),
        list(&|f| format!("call_{:03}", f.index)),
        source.functions.len(),
        buffers.n_input_bytes.max(1),
        buffers.n_log_bytes,
        buffers.n_input_bytes,
        buffers.n_log_bytes,
    );
    let live: Vec<String> =
        (0..N_LIVE + N_LIVE_DOUBLES).map(|i| live_word(i).to_string()).collect();
    let _ = writeln!(text, "unsigned long matrix_live[] = {{ {} }};", live.join(", "));
    if language == Language::Cpp {
        text.push_str("}\n");
    }
}
