//! A case compiled and linked for given addresses.

use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Code, Cpu, FrameArena, ProgramUse, Question,
    RelocTarget, Skeleton, SkeletonBody, SkeletonRequest, StackCopy, check_body, compile_body,
    link_unwinder_skeleton, skip_result,
};
use flea_symbols::addr::RemoteAddr;

use crate::case::{Case, Placing};
use crate::support::programs::plan;

/// Where everything goes.
pub struct Places<'a> {
    pub site: RemoteAddr,
    pub image: RemoteAddr,
    /// Called bodies, [`BODY_STEP`] apart.
    pub bodies: RemoteAddr,
    pub address_of: &'a dyn Fn(RelocTarget) -> u64,
}

/// Bytes for each called body.
pub const BODY_STEP: usize = 0x400;

/// What was made of a case.
pub struct Made {
    pub bodies: Vec<(u32, Body)>,
    /// Called bodies' bytes and where they are.
    pub called: Vec<(RemoteAddr, Vec<u8>)>,
    /// `None` where the site calls the body itself.
    pub skeleton: Option<Skeleton>,
}

/// The codes of a body, in the order in which they run, with what they are called.
pub fn sides(body: &Body) -> [(&'static str, Option<&Code>); 4] {
    [
        ("entry", body.entry.as_ref()),
        ("session", body.session.as_ref()),
        ("modify", body.modify.as_ref()),
        ("exit", body.exit.as_ref()),
    ]
}

/// Compiles and links `case`.
pub fn make(case: &Case, places: &Places<'_>) -> Made {
    let bodies = compile(case, places.site);
    let mut called = vec![];
    let mut all_refs: Vec<[Option<RemoteAddr>; 4]> = vec![];
    let resolved: Vec<[Option<Vec<u8>>; 4]> = bodies
        .iter()
        .map(|(_, body)| {
            sides(body).map(|(_, code)| code.map(|c| c.resolve(|t| (places.address_of)(t))))
        })
        .collect();
    for codes in &resolved {
        all_refs.push(std::array::from_fn(|side| {
            let code = codes[side].as_ref()?;
            let offset = i64::try_from(BODY_STEP * called.len()).unwrap();
            let at = places.bodies.offset(offset);
            assert!(code.len() <= BODY_STEP, "a body of {} bytes", code.len());
            called.push((at, code.clone()));
            Some(at)
        }));
    }
    let skeleton_bodies: Vec<SkeletonBody<'_>> = (0..bodies.len())
        .map(|i| {
            let refer = |side: usize| match case.controllers[i].placing {
                Placing::Inline => resolved[i][side].as_deref().map(BodyRef::Inline),
                Placing::Called | Placing::Direct => all_refs[i][side].map(BodyRef::Call),
            };
            let (frame_offset, body) = &bodies[i];
            SkeletonBody {
                entry: refer(0),
                session: refer(1),
                modify: refer(2),
                exit: refer(3),
                reads: &body.reads,
                saves: &body.saves,
                changes: body.changes,
                frame_words: body.frame_words,
                frame_offset: *frame_offset,
            }
        })
        .collect();
    let is_direct = case.controllers.iter().any(|c| c.placing == Placing::Direct);
    let skeleton = (!is_direct).then(|| link(case, places, &skeleton_bodies));
    Made { bodies, called, skeleton }
}

fn compile(case: &Case, function_address: RemoteAddr) -> Vec<(u32, Body)> {
    let plan = plan(&case.maps);
    let (mut frame_offset, mut state_index) = (BODY_FRAMES_OFFSET, 0);
    let mut made = vec![];
    for controller in &case.controllers {
        let programs: Vec<ProgramUse<'_>> = (state_index..)
            .zip(&controller.programs)
            .map(|(state_index, (kind, verified))| ProgramUse {
                verified,
                kind: *kind,
                cookie: 7,
                state_index,
            })
            .collect();
        let body = compile_body(&BodyRequest {
            signature: &case.signature,
            programs: &programs,
            maps: &case.maps,
            plan: &plan,
            function_address,
            frame_offset,
            printk_map: None,
            cpu: Cpu::default(),
        })
        .unwrap();
        for code in sides(&body).into_iter().filter_map(|(_, code)| code) {
            check_body(&code.bytes).unwrap();
        }
        let n_words = body.frame_words;
        made.push((frame_offset, body));
        frame_offset += 8 * n_words;
        state_index += u32::try_from(programs.len()).unwrap();
    }
    made
}

fn link(case: &Case, places: &Places<'_>, bodies: &[SkeletonBody<'_>]) -> Skeleton {
    let (function, n_replaced) = case.site.function(places.site.0);
    let request = SkeletonRequest {
        replacement: None,
        site: places.site,
        replaced: &function[..n_replaced],
        kind: case.site.kind(),
        image_address: places.image,
        bodies,
        skip: skip_result(&case.signature).ok(),
        stack_copy: StackCopy::Exactly(case.stack_words),
        stack_align_bytes: case.stack_align_bytes,
    };
    let at = |offset| places.image.offset(offset);
    let arena = [FrameArena { start: at(0), end: at(0x20_0000), rows: at(0x1000) }];
    let arenas = if case.is_unwinder { &arena[..] } else { &[] };
    link_unwinder_skeleton(&request, Question::Row, arenas).unwrap()
}
