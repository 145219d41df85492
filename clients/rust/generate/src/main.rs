//! Writes the client's generated code from a descriptor set, so that neither users nor this
//! repository need a protoc: `generate DESCRIPTOR_SET FOLDER`.

use std::error::Error;
use std::{env, fs};

use prost::Message;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(descriptors), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate DESCRIPTOR_SET FOLDER".into());
    };
    let mut set = FileDescriptorSet::decode(&*fs::read(descriptors)?)?;
    // What the contract imports is published by others; only their names are needed.
    set.file.retain(|file| file.package() != "google.api");
    tonic_prost_build::configure()
        .out_dir(folder)
        .extern_path(".google.rpc", "::tonic_types::pb")
        .btree_map(".") // a request's bytes are the same every time
        .enum_attribute(".", "#[non_exhaustive]")
        .server_mod_attribute(".", "#[cfg(feature = \"testing\")]")
        .emit_rerun_if_changed(false)
        .compile_fds(set)?;
    Ok(())
}
