# LONGROPE_SANITIZE: any report ends the program with an error, and so does any warning.
if(LONGROPE_SANITIZE)
  target_compile_options(longrope_cpu PUBLIC
    -Werror -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all)
  target_link_options(longrope_cpu PUBLIC -fsanitize=address,undefined)
endif()
