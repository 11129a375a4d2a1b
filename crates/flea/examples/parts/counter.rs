// The object of the examples: what `clang -O2 -target bpf` makes of
//
// ```c
// struct {
//     __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
//     __uint(max_entries, 1);
//     __type(key, __u32);
//     __type(value, __u64);
// } calls SEC(".maps");
//
// SEC("fentry")
// int count(void *ctx)
// {
//     __u32 key = 0;
//     __u64 *value = bpf_map_lookup_elem(&calls, &key);
//     if (value)
//         *value += 1;
//     return 0;
// }
// ```

use flea::asm::{Asm, JmpOp, Reg, Size};
use flea::{Helper, Map, MapIdx, MapKind, MapSpec, Object, ObjectSpec, ProgramKind, ProgramSpec};

/// Counts calls in element 0 of the map `calls`.
pub fn counter() -> ObjectSpec {
    let mut asm = Asm::new();
    let out = asm.new_label();
    asm.store_imm(Size::W, Reg::R10, -4, 0)
        .map_ref(Reg::R1, MapIdx(0))
        .mov64_reg(Reg::R2, Reg::R10)
        .add64_imm(Reg::R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(JmpOp::Eq, Reg::R0, 0, out)
        .load(Size::DW, Reg::R1, Reg::R0, 0)
        .add64_imm(Reg::R1, 1)
        .store(Size::DW, Reg::R0, 0, Reg::R1)
        .bind(out)
        .mov64_imm(Reg::R0, 0)
        .exit();
    ObjectSpec {
        maps: vec![MapSpec {
            name: "calls".into(),
            kind: MapKind::PerCpuArray,
            key_size_bytes: 4,
            value_size_bytes: 8,
            max_entries: 1,
            flags: 0,
            init: None,
            read_only: false,
            ..MapSpec::default()
        }],
        programs: vec![ProgramSpec {
            name: "count".into(),
            section: "fentry".into(),
            kind: ProgramKind::Fentry,
            insns: asm.finish().expect("its only label is bound"),
            ..ProgramSpec::default()
        }],
        ..ObjectSpec::default()
    }
}

/// The sum over all threads of element 0 of `calls`.
pub fn total(object: &Object) -> u64 {
    let Some(Map::PerCpuArray(calls)) = object.map("calls") else { return 0 };
    let values = calls.get(0).unwrap_or_default();
    values.iter().filter_map(|v| Some(u64::from_le_bytes(*v.first_chunk()?))).sum()
}
