//! What each helper takes and gives: a table, checked by [`crate::call`].

use flea_object::helper::Helper;
use flea_object::spec::MapKind;

/// A helper's prototype.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proto {
    /// `r1` on.
    pub(crate) args: &'static [Arg],
    pub(crate) ret: Ret,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arg {
    /// A number, or a pointer used as one.
    Anything,
    /// As `Anything`, and need not be set at all (a variadic helper's).
    Optional,
    /// A map with elements, also one whose elements are maps.
    LookupMap,
    /// A map with elements that are values, which the helper changes.
    WrittenMap,
    /// A ring buffer.
    RingBuf,
    /// A program array.
    ProgArray,
    /// A number: no pointer is used as one.
    Index,
    /// Readable memory of the map's key size.
    Key,
    /// Readable memory of the map's value size.
    MapValue,
    /// Readable memory; the next argument is its size.
    Read,
    /// Memory that the helper fills; the next argument is its size.
    Fill,
    /// 8 bytes that the helper fills.
    FillU64,
    /// The size of the argument before.
    Size(ZeroSize),
    /// A known number of bytes.
    KnownSize,
    /// A record that is given back.
    Record,
    /// The lock in a map's value.
    Lock,
    /// The context.
    Ctx,
    /// A function of the program, which the helper calls in rounds.
    Callback,
    /// What that function is given besides: an address in a stack frame, or NULL.
    CallbackCtx,
    /// How many rounds there are.
    Rounds,
    /// A map whose elements the rounds go over.
    IteratedMap,
    /// A number, or a pointer into the target's data: none into ours.
    Castable,
    /// The number of one of the target's structures.
    TypeId,
}

/// Whether a size may be 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ZeroSize {
    Allowed,
    Refused,
}

/// What `r0` is afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ret {
    Number,
    /// At most the size argument, or a small negative number.
    LengthOrError,
    /// Unset.
    Void,
    ValueOrNull,
    RecordOrNull,
    Cookie,
    /// 0 to 64.
    BitNumber,
    /// A pointer to the type that the second argument says.
    Cast,
}

const SIZE: Arg = Arg::Size(ZeroSize::Refused);
const SIZE_OR_ZERO: Arg = Arg::Size(ZeroSize::Allowed);

/// `helper`'s prototype.
pub(crate) const fn proto(helper: Helper) -> Proto {
    use Arg::{
        Anything, Callback, CallbackCtx, Castable, Ctx, Fill, FillU64, Index, IteratedMap, Key,
        KnownSize, Lock, LookupMap, MapValue, Optional, ProgArray, Read, Record, RingBuf, Rounds,
        TypeId, WrittenMap,
    };
    let (args, ret): (&'static [Arg], Ret) = match helper {
        Helper::MapLookupElem => (&[LookupMap, Key], Ret::ValueOrNull),
        Helper::MapUpdateElem => (&[WrittenMap, Key, MapValue, Anything], Ret::Number),
        Helper::MapDeleteElem => (&[WrittenMap, Key], Ret::Number),
        Helper::KtimeGetNs
        | Helper::KtimeGetBootNs
        | Helper::GetPrandomU32
        | Helper::GetSmpProcessorId
        | Helper::GetCurrentPidTgid
        | Helper::GetCurrentUidGid => (&[], Ret::Number),
        Helper::TailCall => (&[Ctx, ProgArray, Index], Ret::Void),
        Helper::TracePrintk => (&[Read, SIZE, Optional, Optional, Optional], Ret::Number),
        Helper::TraceVprintk => (&[Read, SIZE, Read, SIZE_OR_ZERO], Ret::Number),
        Helper::GetCurrentComm => (&[Fill, SIZE], Ret::Number),
        Helper::ProbeReadUser | Helper::ProbeRead | Helper::ProbeReadKernel => {
            (&[Fill, SIZE_OR_ZERO, Anything], Ret::Number)
        }
        Helper::ProbeReadUserStr | Helper::ProbeReadStr | Helper::ProbeReadKernelStr => {
            (&[Fill, SIZE_OR_ZERO, Anything], Ret::LengthOrError)
        }
        Helper::ProbeWriteUser => (&[Anything, Read, SIZE], Ret::Number),
        Helper::RingbufOutput => (&[RingBuf, Read, SIZE_OR_ZERO, Anything], Ret::Number),
        Helper::RingbufReserve => (&[RingBuf, KnownSize, Anything], Ret::RecordOrNull),
        Helper::RingbufSubmit | Helper::RingbufDiscard => (&[Record, Anything], Ret::Void),
        Helper::SpinLock | Helper::SpinUnlock => (&[Lock], Ret::Void),
        Helper::RingbufQuery => (&[RingBuf, Anything], Ret::Number),
        Helper::Loop => (&[Rounds, Callback, CallbackCtx, Anything], Ret::Number),
        Helper::ForEachMapElem => (&[IteratedMap, Callback, CallbackCtx, Anything], Ret::Number),
        Helper::GetFuncIp
        | Helper::GetAttachCookie
        | Helper::GetFuncArgCnt
        | Helper::SessionIsReturn => (&[Ctx], Ret::Number),
        Helper::GetFuncArg => (&[Ctx, Anything, FillU64], Ret::Number),
        Helper::GetFuncRet => (&[Ctx, FillU64], Ret::Number),
        Helper::SessionCookie => (&[Ctx], Ret::Cookie),
        Helper::RdonlyCast => (&[Castable, TypeId], Ret::Cast),
        Helper::Fls64 => (&[Anything], Ret::BitNumber),
    };
    Proto { args, ret }
}

impl Arg {
    /// Whether a map of this kind fits, for the arguments that take a map.
    pub(crate) const fn takes_map(self, kind: MapKind) -> bool {
        match self {
            Self::LookupMap => !matches!(kind, MapKind::RingBuf | MapKind::ProgArray),
            Self::WrittenMap | Self::IteratedMap => {
                !matches!(kind, MapKind::RingBuf | MapKind::ProgArray) && !kind.holds_maps()
            }
            Self::RingBuf => matches!(kind, MapKind::RingBuf),
            Self::ProgArray => matches!(kind, MapKind::ProgArray),
            _ => false,
        }
    }

    /// Linux's list of the types that fit, as its messages print it.
    pub(crate) const fn expected(self) -> &'static str {
        match self {
            Self::LookupMap
            | Self::WrittenMap
            | Self::RingBuf
            | Self::ProgArray
            | Self::IteratedMap => "map_ptr",
            Self::Key | Self::MapValue | Self::Read | Self::Fill | Self::FillU64 => {
                "fp, map_value, mem, ringbuf_mem"
            }
            Self::Record => "ringbuf_mem",
            Self::Lock => "map_value",
            Self::Ctx => "ctx",
            Self::Callback => "func",
            Self::CallbackCtx => "fp",
            Self::Anything
            | Self::Optional
            | Self::Index
            | Self::Size(_)
            | Self::KnownSize
            | Self::TypeId
            | Self::Rounds => "scalar",
            Self::Castable => "scalar, ptr_",
        }
    }
}
